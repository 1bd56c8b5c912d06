// What the page asks the server; nothing else is ever asked.

let key = sessionStorage.getItem("key") || "";
let askForKey = async () => "";

export function onKeyNeeded(ask) { askForKey = ask; }

// A link with a token is good for one page: the token is exchanged for the server's key.
export async function useToken() {
  const token = new URLSearchParams(location.hash.slice(1)).get("token");
  if (!token) return;
  history.replaceState(null, "", location.pathname);
  const answer = await fetch("/ui/session", { method: "POST", body: JSON.stringify({ token }) });
  if (answer.ok) keep((await answer.json()).key);
}

function keep(value) {
  key = value;
  sessionStorage.setItem("key", value);
}

export async function request(path, options = {}) {
  const { body, ...rest } = options;
  const headers = { ...(key && { authorization: `Bearer ${key}` }) };
  const isForm = body instanceof FormData;
  if (body && !isForm) headers["content-type"] = "application/json";
  const answer = await fetch(path, { ...rest, headers, body: body && !isForm ? JSON.stringify(body) : body });
  if (answer.status === 401) {
    const given = await askForKey();
    if (given) {
      keep(given);
      return request(path, options);
    }
  }
  if (!answer.ok) throw new Error(await reason(answer));
  return answer;
}

export const getJSON = async (path, options) => (await request(path, options)).json();

async function reason(answer) {
  try {
    const { error } = await answer.json();
    return error.message || String(error);
  } catch {
    return `The server answered ${answer.status}.`;
  }
}

// The chunks of a chat completion as they come.
export async function* chat(body, signal) {
  const answer = await request("/v1/chat/completions", { method: "POST", body, signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The server closed the connection.");
    held += value;
    const events = held.split("\n\n");
    held = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ")) continue;
      const data = event.slice(6);
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}
