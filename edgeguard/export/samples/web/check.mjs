// Computes golden.jsonl in Node with onnxruntime-web's WebAssembly, one verdict a line: node check.mjs [other.jsonl]
//
// Exit codes: 0 all lines are right, 2 a line is wrong. Needs `npm install` first, here or in a folder above.
import { readFile } from "node:fs/promises";

import { Tokenizer } from "@huggingface/tokenizers";
import * as ort from "onnxruntime-web";

import { Guard } from "./edgeguard.mjs";

const read = async (name) => new Uint8Array(await readFile(new URL(name, import.meta.url)));
const guard = await Guard.load(import.meta.url, { ort, Tokenizer, read });
const lines = await readFile(process.argv[2] ?? new URL("golden.jsonl", import.meta.url), "utf-8");
let wrong = 0;
for (const line of lines.split("\n").filter(Boolean)) {
  const answer = await guard.answer(JSON.parse(line));
  console.log(JSON.stringify(answer));
  wrong += !answer.ok;
}
process.exit(wrong ? 2 : 0);
