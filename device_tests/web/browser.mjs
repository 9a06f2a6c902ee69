// Runs an export for the web in headless Chromium: node browser.mjs EXPORT JOB MODULES
//
// Opens the export's own demo page, judges a text there as a person would, then answers every line of JOB's *.jsonl in
// the page and times the plan's lengths. Writes *.jsonl.answers, browser.json and demo.png into JOB. Whatever fails, ends
// the process with exit code 1.
import { createReadStream } from "node:fs";
import { readFile, readdir, stat, writeFile } from "node:fs/promises";
import { createServer } from "node:http";
import { createRequire } from "node:module";
import path from "node:path";

const [exported, job, modules] = process.argv.slice(2).map((folder) => path.resolve(folder));
const CHROMIUMS = [process.env.CHROMIUM, "/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome"];
const TYPES = { ".html": "text/html", ".mjs": "text/javascript", ".json": "application/json", ".wasm": "application/wasm" };
const LOAD_WITHIN_MS = 15 * 60_000;

const plan = JSON.parse(await readFile(path.join(job, "plan.json"), "utf-8"));
const { chromium } = createRequire(path.join(modules, "x.js"))("playwright-core");
const server = await serve();
const executablePath = await firstFile(CHROMIUMS);
const browser = await chromium.launch({ executablePath, args: process.getuid?.() === 0 ? ["--no-sandbox"] : [] });
try {
  const page = await browser.newPage();
  page.setDefaultTimeout(LOAD_WITHIN_MS);
  page.on("pageerror", (error) => console.error(`page: ${error}`));
  page.on("console", (message) => message.type() === "error" && console.error(`page: ${message.text()}`));
  await page.goto(`http://localhost:${server.address().port}/index.html`);
  await page.waitForFunction(() => globalThis.loadMs || globalThis.loadError);
  const loadError = await page.evaluate(() => globalThis.loadError);
  if (loadError) throw new Error(loadError);
  const demo = await judgeInDemo(page);
  if (!["allow", "block", "escalate"].includes(demo)) throw new Error(`the demo page shows ${demo}`);
  for (const name of (await readdir(job)).filter((file) => file.endsWith(".jsonl"))) await answer(page, name);
  const timings = [];
  for (const tokens of plan.tokens) timings.push(await time(page, tokens));
  const facts = {
    version: browser.version(),
    runtime_version: JSON.parse(await readFile(path.join(modules, "onnxruntime-web", "package.json"), "utf-8")).version,
    load_ms: await page.evaluate(() => globalThis.loadMs),
    threads: await page.evaluate(async () => (await import("onnxruntime-web/wasm")).env.wasm.numThreads ?? null),
    isolated: await page.evaluate(() => globalThis.crossOriginIsolated),
    peak_bytes: await rendererPeak(),
    timings,
    demo,
  };
  await writeFile(path.join(job, "browser.json"), JSON.stringify(facts));
} finally {
  await browser.close();
  server.close();
}

/** What the demo page shows for the text that stands in it; a screenshot of that. */
async function judgeInDemo(page) {
  await page.click("#judge");
  await page.waitForFunction(() => document.getElementById("verdict").textContent);
  await page.screenshot({ path: path.join(job, "demo.png") });
  return page.evaluate(() => document.getElementById("verdict").className);
}

async function answer(page, name) {
  const lines = (await readFile(path.join(job, name), "utf-8")).split("\n").filter(Boolean);
  const answers = [];
  for (const line of lines) answers.push(JSON.stringify(await page.evaluate((text) => guard.answer(JSON.parse(text)), line)));
  await writeFile(path.join(job, `${name}.answers`), answers.map((text) => `${text}\n`).join(""));
}

/** Milliseconds of each trial, from token ids to the logits, inside the page. */
async function time(page, tokens) {
  const trials_ms = await page.evaluate(
    async ({ tokens, warmup, trials }) => {
      const lines = (await (await fetch("golden.jsonl")).text()).split("\n").filter(Boolean).map((line) => JSON.parse(line));
      const longest = lines.map((line) => line.ids).sort((a, b) => b.length - a.length)[0];
      const { closing, read } = guard.manifest.template;
      const tail = closing.length + read.prompt.length;
      const ids = [...longest.slice(0, tokens - tail), ...longest.slice(-tail)];
      if (ids.length !== tokens) throw new Error(`no golden vector has ${tokens} tokens`);
      const found = [];
      for (let i = 0; i < warmup + trials; i++) {
        const start = performance.now();
        await guard.logits(ids);
        if (i >= warmup) found.push(performance.now() - start);
      }
      return found;
    },
    { tokens, warmup: plan.warmup, trials: plan.trials },
  );
  return { tokens, warmup: plan.warmup, trials_ms };
}

/** Peak resident memory of the largest renderer process, where Linux tells it. */
async function rendererPeak() {
  const session = await browser.newBrowserCDPSession();
  const { processInfo } = await session.send("SystemInfo.getProcessInfo");
  const peaks = [];
  for (const { id } of processInfo.filter(({ type }) => type === "renderer")) {
    const status = await readFile(`/proc/${id}/status`, "utf-8").catch(() => "");
    peaks.push(1024 * Number(/VmHWM:\s+(\d+)/.exec(status)?.[1] ?? 0));
  }
  return Math.max(0, ...peaks) || null;
}

/** The export, with the modules in its folder node_modules, on a page that may use threads. */
function serve() {
  const made = createServer(async (request, response) => {
    const name = decodeURIComponent(new URL(request.url, "http://localhost").pathname);
    const [root, rest] = name.startsWith("/node_modules/") ? [modules, name.slice("/node_modules".length)] : [exported, name];
    const file = path.join(root, path.normalize(rest));
    if (!file.startsWith(root) || !(await stat(file).then((found) => found.isFile(), () => false))) {
      response.writeHead(404).end();
      return;
    }
    response.writeHead(200, {
      "Content-Type": TYPES[path.extname(file)] ?? "application/octet-stream",
      "Cross-Origin-Opener-Policy": "same-origin",
      "Cross-Origin-Embedder-Policy": "require-corp",
    });
    createReadStream(file).pipe(response);
  });
  return new Promise((resolve) => made.listen(0, "127.0.0.1", () => resolve(made)));
}

async function firstFile(candidates) {
  for (const file of candidates.filter(Boolean)) {
    if (await stat(file).then(() => true, () => false)) return file;
  }
  throw new Error("no Chromium found: install it, or name it in CHROMIUM");
}
