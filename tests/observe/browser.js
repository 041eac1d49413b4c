// Drives Chromium for the tests of the status page (page.rs). Each line of stdin is a JSON string: the body of an
// async function of `it`. Its result is one line of JSON on stdout: {"ok": ...} or {"error": "..."}.
"use strict";
const fs = require("node:fs");
const path = require("node:path");
const readline = require("node:readline");

// Where npm has installed the packages, and the browser.
const [directory, executablePath] = process.argv.slice(2);
const load = require("node:module").createRequire(path.join(directory, "package.json"));
const Body = Object.getPrototypeOf(async () => {}).constructor;

// Runs in the page before its own script: records violations of its policy, and when it shows the first figures.
function watch() {
  window.violations = [];
  document.addEventListener("securitypolicyviolation", (event) => {
    window.violations.push(event.violatedDirective + " " + event.blockedURI);
  });
  new MutationObserver((_, observer) => {
    if (!document.querySelector("#figures div") || !document.querySelector("#workers tbody tr")) return;
    window.firstFigures = performance.now();
    observer.disconnect();
  }).observe(document, { childList: true, subtree: true });
}

async function main() {
  const it = { fs, seen: null, context: null, page: null, session: null };
  const browser = await load("playwright-core").chromium.launch({ executablePath });
  it.axe = () => fs.readFileSync(load.resolve("axe-core/axe.min.js"), "utf8");

  // Opens the page in a new window, and records what it says and asks for. `change` may change each status.
  it.open = async (url, options = {}, change = null) => {
    if (it.context) await it.context.close();
    it.context = await browser.newContext(options);
    const page = (it.page = await it.context.newPage());
    const seen = (it.seen = { console: [], errors: [], requests: [] });
    page.on("console", (message) => seen.console.push(message.type() + ": " + message.text()));
    page.on("pageerror", (error) => seen.errors.push(String(error)));
    page.on("request", (request) => seen.requests.push(request.url()));
    await page.addInitScript(watch);
    if (change) {
      await page.route("**/status.json", async (route) => {
        const answer = await route.fetch();
        await route.fulfill({ response: answer, json: change(await answer.json()) });
      });
    }
    await page.goto(url);
    await it.figures();
  };
  // Waits until an expression is true in the page. `waitForFunction` would break its policy: it uses eval later on.
  it.until = async (expression) => {
    const end = Date.now() + 20_000;
    while (!(await it.page.evaluate(expression))) {
      if (Date.now() > end) throw new Error("waited in vain: " + expression);
      await new Promise((resolve) => setTimeout(resolve, 20));
    }
  };
  it.figures = () => it.until("window.firstFigures !== undefined");
  // Waits until the page has drawn `count` more answers.
  it.ticks = async (count) => {
    for (let tick = 0; tick < count; tick++) {
      await it.page.waitForResponse((answer) => answer.url().endsWith("/history.json"));
    }
    await it.until("!busy");
  };
  // Pauses the page and returns the status that it shows.
  it.pause = async () => {
    await it.page.click("#pause");
    await it.until("!busy");
    return it.page.evaluate("status");
  };
  // The cells of a table, row by row, with its head as the first row.
  it.table = (id) =>
    it.page.$$eval("#" + id + " tr", (rows) => rows.map((row) => [...row.cells].map((cell) => cell.textContent)));
  it.headers = () =>
    it.page.$$eval("#figures > div", (boxes) => Object.fromEntries(boxes.map((box) => [...box.children].map((one) => one.textContent))));

  for await (const line of readline.createInterface({ input: process.stdin })) {
    let answer;
    try {
      answer = { ok: (await new Body("it", JSON.parse(line))(it)) ?? null };
    } catch (error) {
      answer = { error: String(error.stack || error) };
    }
    process.stdout.write(JSON.stringify(answer) + "\n");
  }
  await browser.close();
}

main().catch((error) => {
  process.stdout.write(JSON.stringify({ error: String(error.stack || error) }) + "\n");
  process.exitCode = 1;
});
