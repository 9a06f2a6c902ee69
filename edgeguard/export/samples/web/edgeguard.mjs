// A guard in JavaScript: text -> verdict, in the browser or in Node, without a server.
//
//   import * as ort from "onnxruntime-web/wasm";
//   import { Tokenizer } from "@huggingface/tokenizers";
//   import { Guard } from "./edgeguard.mjs";
//   const guard = await Guard.load("./", { ort, Tokenizer });
//   const verdict = await guard.judge([{ role: "user", content: "How do I sharpen a kitchen knife?" }]);
//
// The two libraries are passed in, so this file works with any bundler and any build of onnxruntime-web. Everything that
// goes wrong throws: treat that as "block", never as "allow".

const CHARS_PER_TOKEN = 128; // at most: so huge text is cut before it is tokenized
const JUDGED_SHARE = 0.75; // of the room, for the judged message when the turns before it are long
const FEW = 8; // tokens of a turn: fewer say nothing
const LONE_SURROGATES = /[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g;

/** A loaded export. Make one with Guard.load. */
export class Guard {
  constructor(manifest, tokenize, session, ort) {
    Object.assign(this, { manifest, tokenize, session, ort });
  }

  /**
   * Load the export at `base` (a URL, absolute or relative to the page). `read`: name -> Uint8Array, where fetch cannot
   * read it. Size and SHA-256 of model and tokenizer are compared with the manifest. `providers`: of onnxruntime-web.
   */
  static async load(base, { ort, Tokenizer, read, providers = ["wasm"] }) {
    const get = read ?? ((name) => download(new URL(name, new URL(base, globalThis.location?.href))));
    const manifest = parse(await get("manifest.json"));
    if (manifest.format !== "edgeguard-bundle" || manifest.format_version !== 1) {
      throw new Error(`manifest.json: expected an edgeguard-bundle of version 1, found ${manifest.format}`);
    }
    const [model, tokenizer] = await Promise.all(
      ["model.onnx", "tokenizer.json"].map(async (name) => verified(name, await get(name), manifest.files[name])),
    );
    const library = new Tokenizer(parse(tokenizer), {});
    const tokenize = (text) => library.encode(text, { add_special_tokens: false }).ids;
    const session = await ort.InferenceSession.create(model, { executionProviders: providers });
    return new Guard(manifest, tokenize, session, ort);
  }

  /** Judge the last of `messages` ([{role, content}]) -> {action, pUnsafe, margin, hazards, target, truncated, tokens}. */
  async judge(messages, point = "balanced") {
    const { ids, target, truncated } = encode(messages, this.tokenize, this.manifest);
    const logits = await this.logits(ids);
    const margin = logits[1] - logits[0];
    const { pUnsafe, action } = verdict(margin, target, truncated, this.manifest, point);
    const hazards = Object.fromEntries(this.manifest.head.slice(2).map((label, i) => [label, sigmoid(logits[i + 2])]));
    return { action, pUnsafe, margin, hazards, target, truncated, tokens: ids.length };
  }

  /** Token ids -> logits of the head, one a label. */
  async logits(ids) {
    const shape = [1, ids.length];
    const feeds = {
      input_ids: new this.ort.Tensor("int64", BigInt64Array.from(ids, BigInt), shape),
      attention_mask: new this.ort.Tensor("int64", new BigInt64Array(ids.length).fill(1n), shape),
    };
    const { logits } = await this.session.run(feeds);
    const found = Array.from(await logits.getData());
    if (found.length !== this.manifest.head.length) throw new Error(`the model returned ${found.length} logits`);
    return found;
  }

  /** What this platform makes of a line of golden.jsonl; `ok` says whether that is right. */
  async answer(line) {
    const { ids, target, truncated } = encode(line.messages, this.tokenize, this.manifest);
    const logits = await this.logits(ids);
    const margin = logits[1] - logits[0];
    const { pUnsafe, action } = verdict(margin, target, truncated, this.manifest);
    const golden = verdict(line.margin, target, truncated, this.manifest);
    const same_ids = ids.length === line.ids.length && ids.every((id, i) => id === line.ids[i]);
    const same_rules = golden.action === line.action && Math.abs(golden.pUnsafe - line.p_unsafe) < 1e-6;
    const ok = same_ids && same_rules && Math.abs(margin - line.margin) <= line.tolerance;
    return { ok, same_ids, same_rules, margin, p_unsafe: pUnsafe, action };
  }
}

/** Messages -> {ids, target, truncated}; as `rules.py` of the other targets. Throws for nothing to judge. */
export function encode(messages, tokenize, manifest) {
  const { template, max_tokens: limit } = manifest;
  const side = limit * CHARS_PER_TOKEN;
  const whole = messages.map(({ content }) => content.replace(LONE_SURROGATES, "\ufffd"));
  const texts = whole.map((text) => clip(text, side));
  if (!whole.length || /^[\0 \t\r\n]*$/.test(whole.at(-1))) {
    throw new Error("nothing to judge: the last message is empty");
  }
  const target = messages.at(-1).role === "assistant" ? "response" : "prompt";
  const clipped = texts.some((text, i) => text.length < whole[i].length);
  const bodies = texts.map((text) => tokenize(text));
  const reserved = new Set(template.reserved);
  if (bodies.some((body) => body.some((id) => reserved.has(id)))) {
    throw new Error("the tokenizer turned text into a special token");
  }
  const openings = messages.map(({ role }) => template.opening[role]);
  const overheads = openings.map((opening) => opening.length + template.closing.length);
  const kept = fit(bodies, overheads, limit - template.read[target].length);
  const ids = kept.flatMap((body, i) => [...openings[bodies.length - kept.length + i], ...body, ...template.closing]);
  const cut = kept.length < bodies.length || kept.some((body, i) => body.length < bodies[i].length);
  return { ids: [...ids, ...template.read[target]], target, truncated: clipped || cut };
}

/** Margin -> {pUnsafe, action}: "allow", "block", or "escalate" where not all was read. Throws for what is no number. */
export function verdict(margin, target, truncated, manifest, point = "balanced") {
  const { temperature, bias } = manifest.calibration[target];
  const threshold = manifest.operating_points[point].thresholds[target];
  const numbers = { margin, temperature, bias, threshold, pUnsafe: sigmoid(margin / temperature + bias) };
  for (const [name, value] of Object.entries(numbers)) {
    if (!Number.isFinite(value)) throw new Error(`${name} is ${value}`);
  }
  const { pUnsafe } = numbers;
  return { pUnsafe, action: pUnsafe >= threshold ? "block" : truncated ? "escalate" : "allow" };
}

/** Head and tail of a text that cannot fit, by characters as Unicode counts them: no surrogate pair is cut. */
function clip(text, side) {
  if (text.length <= 2 * side) return text;
  const characters = [...text];
  if (characters.length <= 2 * side) return text;
  return characters.slice(0, side).join("") + characters.slice(-side).join("");
}

/** Trim to `room` tokens: the judged message before the newest turns, head and tail of each. */
function fit(bodies, overheads, room) {
  const sum = (values) => values.reduce((a, b) => a + b, 0);
  const lengths = bodies.map((body) => body.length);
  if (sum(lengths) + sum(overheads) <= room) return bodies;
  const last = bodies.length - 1;
  const wanted = sum(lengths.slice(0, last)) + sum(overheads.slice(0, last));
  const own = room - overheads[last];
  const share = Math.min(wanted, Math.trunc(room * (1 - JUDGED_SHARE)), Math.trunc(own / 2));
  const kept = [cutMiddle(bodies[last], own - share)];
  let left = own - kept[0].length;
  for (let i = last - 1; i >= 0 && left - overheads[i] >= Math.min(lengths[i], FEW); i--) {
    kept.unshift(cutMiddle(bodies[i], left - overheads[i]));
    left -= overheads[i] + kept[0].length;
  }
  return kept;
}

function cutMiddle(ids, room) {
  const head = Math.ceil(room / 2);
  return ids.length <= room ? ids : [...ids.slice(0, head), ...ids.slice(ids.length - (room - head))];
}

function sigmoid(x) {
  return x >= 0 ? 1 / (1 + Math.exp(-x)) : Math.exp(x) / (1 + Math.exp(x)); // neither overflows
}

async function download(url) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url}: ${response.status} ${response.statusText}`);
  return new Uint8Array(await response.arrayBuffer());
}

function parse(bytes) {
  return JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes));
}

async function verified(name, bytes, entry) {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes)); // needs https, or localhost
  const found = Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
  if (bytes.length !== entry.bytes || found !== entry.sha256) throw new Error(`${name}: not the file that manifest.json lists`);
  return bytes;
}
