// What programs of this folder share, as trying.py has it for Python's.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

export const URL_ROOT = process.env.PHIMLX_URL;
export const NANO = "nano", SEEING = "nano-multimodal";
const assets = process.env.PHIMLX_ASSETS;
export const CLIP = `${assets}/clips/speech-00.flac`;
export const PICTURE = readFileSync(`${assets}/pictures/vision-00.png`);
export const PICTURE_DATA = PICTURE.toString("base64");
export const PICTURE_URL = `data:image/png;base64,${PICTURE_DATA}`;
export const QUESTION = "What is 2 plus 3?";
export const CITY = {
  type: "object",
  properties: { city: { type: "string", enum: ["Paris", "Rome"] } },
  required: ["city"],
  additionalProperties: false,
};

// A package from the folder of tools, which is not above this file.
const require = createRequire(`${process.env.PHIMLX_TOOLS}/node_modules/none.js`);
export const tool = async (name) => import(pathToFileURL(require.resolve(name)).href);

export function check(value) {
  if (!value || value.length === 0) throw new Error(`got ${JSON.stringify(value)}`);
  return value;
}

export async function refuses(call, words = "There is no model absent here.") {
  let got;
  try {
    got = await call();
  } catch (error) {
    const told = `${error} ${error.responseBody ?? ""}`;
    if (!told.includes(words)) throw new Error(`the error was ${told}`);
    return;
  }
  throw new Error(`no error, but ${JSON.stringify(got)}`);
}

export async function attempts(table) {
  for (const [what, run] of Object.entries(table)) {
    let why = "";
    try {
      await run();
    } catch (error) {
      why = `${error}` || "failed";
    }
    console.log(JSON.stringify({ what, ok: !why, why }));
  }
}
