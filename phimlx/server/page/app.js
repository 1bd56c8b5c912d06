// The chat page: what it shows, and what its buttons do.

import { chat, getJSON, onKeyNeeded, request, useToken } from "./api.js";
import { Drawing, copyText, element } from "./markdown.js";
import { startRecording } from "./record.js";

const find = (id) => document.getElementById(id);
const log = find("log"), prompt = find("prompt"), modelChoice = find("model");

const state = {
  models: [],
  keeps: false,
  place: null, // { id, revision } where the conversation is kept
  messages: [],
  files: [],
  running: null, // an AbortController
  asked: 0, // how often for conversations
};

// ---- models, theme, settings ----

async function loadModels() {
  const { models, personas, keeps } = await getJSON("/ui/models");
  state.models = models;
  state.keeps = keeps;
  const options = (list) => list.map(({ name }) => element("option", { value: name }, name));
  modelChoice.replaceChildren(...options(models));
  const hearing = models.filter(({ takes }) => takes.includes("audio"));
  find("transcribe").querySelector("[name=model]").replaceChildren(...options(hearing));
  find("open-transcribe").hidden = !hearing.length;
  chooseModel(localStorage.getItem("model"));
  find("side").classList.toggle("off", !keeps);
  state.personas = personas;
  find("persona-label").hidden = !personas.length;
  find("persona").replaceChildren(element("option", { value: "" }, "none"), ...options(personas));
}

const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];

// A persona fills in the settings, which may be changed as any others.
find("persona").addEventListener("change", () => {
  const chosen = state.personas.find(({ name }) => name === find("persona").value) || {};
  field("system").value = chosen.system || "";
  for (const name of NUMBERS) field(name).value = chosen[name] ?? "";
  if (chosen.model) chooseModel(chosen.model);
});

function chooseModel(name) {
  if (state.models.some((each) => each.name === name)) modelChoice.value = name;
  showWhatFits();
}

function taken() {
  return state.models.find(({ name }) => name === modelChoice.value)?.takes || ["text"];
}

function showWhatFits() {
  const media = ["image", "audio"].filter((kind) => taken().includes(kind));
  find("attach").hidden = !media.length;
  find("pick").accept = media.map((kind) => `${kind}/*`).join(",");
  find("record").hidden = !media.includes("audio") || !navigator.mediaDevices;
}

modelChoice.addEventListener("change", () => {
  localStorage.setItem("model", modelChoice.value);
  showWhatFits();
});

const themes = ["light", "dark"];
function applyTheme(name) {
  if (themes.includes(name)) document.documentElement.dataset.theme = name;
}
find("theme").addEventListener("click", () => {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const now = document.documentElement.dataset.theme || (dark ? "dark" : "light");
  const next = now === "dark" ? "light" : "dark";
  localStorage.setItem("theme", next);
  applyTheme(next);
});

const settingsForm = find("settings").querySelector("form");
const field = (name) => settingsForm.elements[name];

function settings() {
  const found = {};
  for (const name of NUMBERS) {
    if (field(name).value !== "") found[name] = Number(field(name).value);
  }
  return found;
}

function schema() {
  const text = field("schema").value.trim();
  return text ? JSON.parse(text) : null;
}

function checkSchema() {
  try {
    schema();
    find("schema-error").textContent = "";
    return true;
  } catch (error) {
    find("schema-error").textContent = `The schema is not JSON: ${error.message}`;
    return false;
  }
}
field("schema").addEventListener("input", checkSchema);
settingsForm.addEventListener("submit", (event) => {
  if (!checkSchema()) event.preventDefault();
});
find("open-settings").addEventListener("click", () => find("settings").showModal());

// ---- files ----

const kindOf = (file) => file.type.split("/")[0];

const asDataURL = (file) => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.onload = () => resolve(reader.result);
  reader.onerror = () => reject(reader.error);
  reader.readAsDataURL(file);
});

async function digest(file) {
  if (!crypto.subtle) return "";
  const bytes = new Uint8Array(await crypto.subtle.digest("SHA-256", await file.arrayBuffer()));
  return [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

async function addFiles(list) {
  for (const file of list) {
    const kind = kindOf(file);
    if (!["image", "audio"].includes(kind)) say(`${file.name} is neither a picture nor a recording.`, true);
    else if (!taken().includes(kind)) say(`${modelChoice.value} takes no ${kind === "image" ? "pictures" : "recordings"}.`, true);
    else state.files.push({ kind, name: file.name, url: await asDataURL(file), sha256: await digest(file) });
  }
  showFiles();
}

function showFiles() {
  find("files").replaceChildren(...state.files.map((file) => {
    const remove = element("button", { type: "button", "aria-label": `Remove ${file.name}`, onclick: () => {
      state.files.splice(state.files.indexOf(file), 1);
      showFiles();
    } }, "×");
    const shown = file.kind === "image" ? [element("img", { src: file.url, alt: "" })] : [];
    return element("li", {}, ...shown, file.name, remove);
  }));
}

find("attach").addEventListener("click", () => find("pick").click());
find("pick").addEventListener("change", async () => {
  await addFiles(find("pick").files);
  find("pick").value = "";
});
prompt.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) {
    event.preventDefault();
    addFiles(event.clipboardData.files);
  }
});
let dragged = 0;
addEventListener("dragenter", () => { dragged += 1; find("drop").hidden = false; });
addEventListener("dragleave", () => { dragged -= 1; if (dragged <= 0) find("drop").hidden = true; });
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  dragged = 0;
  find("drop").hidden = true;
  addFiles(event.dataTransfer.files);
});

let stopRecording = null;
find("record").addEventListener("click", async () => {
  try {
    if (stopRecording) {
      const stop = stopRecording;
      stopRecording = null;
      await addFiles([await stop()]);
    } else {
      stopRecording = await startRecording();
    }
  } catch (error) {
    say(`The microphone cannot be used: ${error.message}`, true);
  }
  find("record").setAttribute("aria-pressed", String(Boolean(stopRecording)));
  find("record").textContent = stopRecording ? "Stop recording" : "Record";
});

// ---- messages ----

function say(text, isError = false) {
  find("status").textContent = text;
  find("status").className = isError ? "error" : "";
}

const button = (text, action) => element("button", { type: "button", onclick: action }, text);

function showMessage(message, index) {
  const isUser = message.role === "user";
  const body = element("div", { class: "body" });
  const tools = element("div", { class: "tools" });
  const item = element("article", { class: `message ${message.role}` }, element("h3", {}, isUser ? "You" : message.model || "Answer"));
  const shown = { item, body, tools };
  if (isUser) {
    const files = (message.files || []).map((file) => file.kind === "image" && file.url ? element("img", { src: file.url, alt: file.name }) : element("span", {}, `[${file.name}]`));
    if (files.length) item.append(element("div", { class: "files" }, ...files));
    body.textContent = message.text;
    tools.append(button("Copy", (event) => copyText(message.text, event.target)), button("Edit", () => edit(index)));
  } else {
    shown.reasoning = element("div");
    shown.thoughts = element("details", { class: "reasoning", hidden: true }, element("summary", {}, "Reasoning"), shown.reasoning);
    item.append(shown.thoughts);
    shown.drawing = new Drawing(body);
    drawReply(shown, message);
    addReplyTools(shown, message, index);
  }
  item.append(body, tools);
  log.append(item);
  return shown;
}

function drawReply(shown, message) {
  shown.thoughts.hidden = !message.reasoning;
  shown.reasoning.textContent = message.reasoning || "";
  shown.drawing.draw(message.text);
}

function addReplyTools(shown, message, index) {
  const { stats } = message;
  const figures = stats?.generated_tokens ? [element("span", { class: "figures" }, `${stats.generated_tokens} tokens` + (stats.rate ? ` · ${stats.rate.toFixed(1)} tokens/s` : ""))] : [];
  shown.tools.replaceChildren(button("Copy", (event) => copyText(message.text, event.target)), button("Retry", () => retry(index)), ...figures);
}

function showAll() {
  log.replaceChildren();
  state.messages.forEach(showMessage);
  log.scrollTop = log.scrollHeight;
}

const isAtEnd = () => log.scrollHeight - log.scrollTop - log.clientHeight < 80;

function wire(message) {
  if (message.role !== "user") return { role: message.role, content: message.text };
  const files = (message.files || []).filter(({ url }) => url);
  if (!files.length) return { role: "user", content: message.text };
  const parts = files.map(({ kind, url, name }) => kind === "image"
    ? { type: "image_url", image_url: { url } }
    : { type: "input_audio", input_audio: { data: url.slice(url.indexOf(",") + 1), format: /\.mp3$/i.test(name) ? "mp3" : "wav" } });
  return { role: "user", content: message.text ? [...parts, { type: "text", text: message.text }] : parts };
}

async function answer() {
  const system = field("system").value.trim();
  const wanted = schema();
  const body = {
    model: modelChoice.value,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...state.messages.map(wire)],
    stream: true,
    stream_options: { include_usage: true },
    ...settings(),
    ...(wanted && { response_format: { type: "json_schema", json_schema: { name: "answer", schema: wanted } } }),
  };
  const message = { role: "assistant", text: "", reasoning: "", model: modelChoice.value, stats: {} };
  state.messages.push(message);
  const shown = showMessage(message, state.messages.length - 1);
  shown.tools.replaceChildren();
  log.scrollTop = log.scrollHeight;
  const running = new AbortController();
  state.running = running;
  setBusy(true);
  let first = 0, waiting = false, failed = false;
  const draw = () => {
    waiting = false;
    const follow = isAtEnd();
    drawReply(shown, message);
    if (follow) log.scrollTop = log.scrollHeight;
  };
  try {
    for await (const { choices: [choice], usage } of chat(body, running.signal)) {
      first = first || performance.now();
      message.text += choice?.delta.content || "";
      message.reasoning += choice?.delta.reasoning_content || "";
      if (usage) message.stats = { prompt_tokens: usage.prompt_tokens, generated_tokens: usage.completion_tokens };
      if (!waiting) {
        waiting = true;
        requestAnimationFrame(draw);
      }
    }
    const seconds = (performance.now() - first) / 1000;
    if (message.stats.generated_tokens > 1) message.stats.rate = (message.stats.generated_tokens - 1) / seconds;
    say("");
  } catch (error) {
    failed = error.name !== "AbortError";
    say(failed ? error.message : "Stopped.", failed);
  }
  state.running = null;
  setBusy(false);
  draw();
  if (failed && !message.text && !message.reasoning) {
    state.messages.pop();
    shown.item.remove();
  } else {
    addReplyTools(shown, message, state.messages.indexOf(message));
    await keep();
  }
  prompt.focus();
}

function setBusy(busy) {
  find("stop").hidden = !busy;
  find("send").hidden = busy;
  log.setAttribute("aria-busy", String(busy));
}

async function send() {
  const text = prompt.value.trim();
  if (state.running || (!text && !state.files.length)) return;
  if (!checkSchema()) {
    find("settings").showModal();
    return;
  }
  state.messages.push({ role: "user", text, files: state.files });
  state.files = [];
  prompt.value = "";
  grow();
  showFiles();
  showMessage(state.messages.at(-1), state.messages.length - 1);
  await answer();
}

async function retry(index) {
  if (state.running) return;
  state.messages.length = index;
  showAll();
  await answer();
}

function edit(index) {
  if (state.running) return;
  const message = state.messages[index];
  state.messages.length = index;
  state.files = (message.files || []).filter(({ url }) => url);
  showAll();
  showFiles();
  prompt.value = message.text;
  grow();
  prompt.focus();
}

find("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
find("stop").addEventListener("click", () => state.running?.abort());
prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
function grow() {
  prompt.rows = Math.min(12, prompt.value.split("\n").length);
}
prompt.addEventListener("input", grow);
addEventListener("keydown", (event) => {
  if (event.key === "Escape" && state.running) state.running.abort();
  if (event.key === "Escape") toggleSide(false);
  if (event.ctrlKey && event.shiftKey && event.key.toLowerCase() === "o") {
    event.preventDefault();
    begin();
  }
});

// ---- conversations that are kept ----

function kept(message) {
  if (message.role === "assistant") {
    return { role: "assistant", content: message.text, ...(message.reasoning && { reasoning: message.reasoning }) };
  }
  const files = (message.files || []).filter(({ sha256 }) => sha256);
  if (!files.length) return { role: message.role, content: message.text };
  const parts = files.map(({ kind, name, sha256 }) => ({ type: kind, path: name, sha256 }));
  return { role: message.role, content: message.text ? [...parts, { type: "text", text: message.text }] : parts };
}

function shownOf({ role, content, reasoning, stats, model }) {
  const parts = Array.isArray(content) ? content : [{ type: "text", text: content }];
  const files = parts.filter(({ type }) => type !== "text").map(({ type, path, sha256 }) => ({ kind: type, name: path, sha256 }));
  return { role, text: parts.map(({ text }) => text || "").join(""), files, reasoning, stats, model };
}

async function keep() {
  if (!state.keeps) return;
  const body = {
    model: modelChoice.value,
    system: field("system").value.trim() || null,
    settings: settings(),
    messages: state.messages.map(kept),
    stats: state.messages.at(-1).stats || null,
    ...(state.place && { revision: state.place.revision }),
  };
  try {
    const path = state.place ? `/ui/conversations/${state.place.id}` : "/ui/conversations";
    state.place = await getJSON(path, { method: state.place ? "PUT" : "POST", body });
    await listConversations();
  } catch (error) {
    say(`This conversation is not kept: ${error.message}`, true);
  }
}

async function listConversations() {
  if (!state.keeps) return;
  const search = find("search").value.trim(), asked = ++state.asked;
  const { conversations } = await getJSON(`/ui/conversations?search=${encodeURIComponent(search)}`);
  if (asked !== state.asked) return; // a later answer is under way, or was there first
  find("conversations").replaceChildren(...conversations.map(({ id, title }) => {
    const open = element("button", { type: "button", class: "title", title, "aria-current": state.place?.id === id ? "true" : undefined, onclick: () => openConversation(id) }, title || `Conversation ${id}`);
    const remove = element("button", { type: "button", "aria-label": `Delete ${title}`, onclick: () => deleteConversation(id, title) }, "×");
    return element("li", {}, open, remove);
  }));
}

async function openConversation(id) {
  if (state.running) return;
  try {
    const found = await getJSON(`/ui/conversations/${id}`);
    state.place = { id: found.id, revision: found.revision };
    state.messages = found.messages.filter(({ role }) => role !== "tool").map(shownOf);
    field("system").value = found.system || "";
    for (const name of NUMBERS) field(name).value = found.settings[name] ?? "";
    chooseModel(found.model);
    showAll();
    toggleSide(false);
    say("");
    await listConversations();
    prompt.focus();
  } catch (error) {
    say(error.message, true);
  }
}

async function deleteConversation(id, title) {
  if (!confirm(`Delete “${title}” for good?`)) return;
  await request(`/ui/conversations/${id}`, { method: "DELETE" });
  if (state.place?.id === id) begin();
  await listConversations();
}

function begin() {
  if (state.running) return;
  state.place = null;
  state.messages = [];
  state.files = [];
  showAll();
  showFiles();
  say("");
  toggleSide(false);
  listConversations();
  prompt.focus();
}

function toggleSide(open) {
  find("side").classList.toggle("open", open);
  find("menu").setAttribute("aria-expanded", String(open));
}

find("new").addEventListener("click", begin);
find("search").addEventListener("input", () => listConversations().catch((error) => say(error.message, true)));
find("menu").addEventListener("click", () => toggleSide(!find("side").classList.contains("open")));

// ---- transcripts ----

const transcribeForm = find("transcribe").querySelector("form");
find("open-transcribe").addEventListener("click", () => find("transcribe").showModal());
find("transcribe").querySelector("[data-close]").addEventListener("click", () => find("transcribe").close());
transcribeForm.addEventListener("submit", async (event) => {
  event.preventDefault();
  const { file, model, format, translate } = transcribeForm.elements;
  const problem = transcribeForm.querySelector(".error"), submit = transcribeForm.querySelector("[type=submit]");
  const form = new FormData();
  form.append("file", file.files[0]);
  form.append("model", model.value);
  form.append("response_format", format.value);
  problem.textContent = "";
  submit.disabled = true;
  submit.textContent = "Listening…";
  try {
    const path = `/v1/audio/${translate.checked ? "translations" : "transcriptions"}`;
    const text = await (await request(path, { method: "POST", body: form })).text();
    find("transcript").textContent = text;
    find("transcript").hidden = false;
    const save = find("save-transcript");
    URL.revokeObjectURL(save.href);
    save.href = URL.createObjectURL(new Blob([text], { type: "text/plain" }));
    save.download = `${file.files[0].name.replace(/\.[^.]*$/, "")}.${format.value === "text" ? "txt" : format.value}`;
    save.hidden = false;
  } catch (error) {
    problem.textContent = error.message;
  }
  submit.disabled = false;
  submit.textContent = "Transcribe";
});

// ---- start ----

onKeyNeeded(() => new Promise((resolve) => {
  const dialog = find("key");
  dialog.showModal();
  dialog.addEventListener("close", () => resolve(dialog.querySelector("input").value), { once: true });
}));
applyTheme(localStorage.getItem("theme"));
try {
  await useToken();
  await loadModels();
  await listConversations();
} catch (error) {
  say(error.message, true);
}
prompt.focus();
document.documentElement.dataset.ready = "true";
