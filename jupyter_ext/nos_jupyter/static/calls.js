// @ts-check
// A form for calls of one model, with its results; part of several widgets.
//
// Messages to the kernel: run {id, model, method, arguments}, cancel {id}. From it, by id: result {view},
// item {view}, done {total_s}, failed {name, sentence, traceback}.

import { errorBox, button, make, suppressShortcuts } from "./page.js";
import { makeInput } from "./inputs.js";
import { addItem, release, showResult } from "./results.js";

const WAIT_MS = 60;

export class Calls {
  /** @param {import("./page.js").Post} post */
  constructor(post) {
    this.post = post;
    /** @type {any} */ this.model = null;
    /** @type {any} */ this.method = null;
    /** @type {Map<string, any>} */ this.inputs = new Map();
    /** The call under way; null if none. @type {string | null} */ this.call = null;
    /** Whether something changed while it was. */ this.isChanged = false;
    /** @type {ReturnType<typeof setTimeout> | undefined} */ this.timer = undefined;
    this.began = 0;
    this.root = make("div", "nos-calls");
    this.root.dataset.runs = "0";
    this.about = make("div", "nos-faint nos-about");
    this.tabs = make("div", "nos-group nos-tabs");
    this.tabs.setAttribute("role", "group");
    this.tabs.setAttribute("aria-label", "Method");
    this.form = make("div", "nos-form");
    this.runner = button("Run", "Run the model", () => this.run());
    this.runner.classList.add("nos-primary");
    this.stopper = button("Stop", "Cancel the call", () => this.call && this.post.send({ type: "cancel", id: this.call }));
    this.stopper.disabled = true;
    this.live = suppressShortcuts(make("input", "nos-check"));
    this.live.type = "checkbox";
    const live = make("label", "nos-inline");
    live.append(this.live, "run at every change");
    this.live.addEventListener("change", () => this.live.checked && this.run());
    this.timing = make("span", "nos-faint nos-timing");
    this.timing.setAttribute("aria-live", "polite");
    const bar = make("div", "nos-bar");
    bar.append(this.runner, this.stopper, live, make("span", "nos-space"), this.timing);
    this.place = make("div", "nos-result");
    this.place.setAttribute("role", "region");
    this.place.setAttribute("aria-label", "Result");
    this.wrong = make("div", "nos-wrong-place");
    const columns = make("div", "nos-columns");
    const left = make("div", "nos-column");
    left.append(this.form, bar, this.wrong);
    const right = make("div", "nos-column");
    right.append(this.place);
    columns.append(left, right);
    this.code = make("code", "nos-line");
    const copy = button("Copy", "Copy the line that does the same", () => navigator.clipboard?.writeText(this.code.textContent ?? ""));
    const foot = make("div", "nos-foot");
    foot.append(this.code, copy);
    this.root.append(this.about, this.tabs, columns, foot);
    this.root.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
        event.preventDefault();
        event.stopPropagation();
        this.run();
      }
    });
  }

  /** Shows a model's form; keeps what was filled in where the interface is the same. @param {any} model */
  show(model) {
    const isSame = this.model && this.model.name === model.name && JSON.stringify(this.model.methods) === JSON.stringify(model.methods);
    this.model = model;
    if (isSame) return;
    this.about.textContent = model.doc;
    this.tabs.replaceChildren();
    this.tabs.hidden = model.methods.length < 2;
    for (const method of model.methods) {
      const tab = button(method.name === "__call__" ? "call" : method.name, method.doc || method.name, () => this.#choose(method));
      tab.title = method.signature;
      tab.dataset.method = method.name;
      this.tabs.append(tab);
    }
    if (model.methods.length) this.#choose(model.methods.find((/** @type {any} */ it) => it.name === this.method?.name) ?? model.methods[0]);
  }

  /** @param {any} method */
  #choose(method) {
    this.inputs.forEach((input) => input.close());
    this.method = method;
    for (const tab of /** @type {any} */ (this.tabs.children)) tab.setAttribute("aria-pressed", String(tab.dataset.method === method.name));
    this.inputs = new Map(method.parameters.map((/** @type {any} */ parameter) => [parameter.name, makeInput(parameter, () => this.#change())]));
    this.form.replaceChildren(...[...this.inputs.values()].map((input) => input.root));
    if (!this.inputs.size) this.form.append(make("div", "nos-faint", "takes nothing"));
    this.live.checked = method.parameters.some((/** @type {any} */ it) => it.control === "drawing");
    release(this.place);
    this.place.replaceChildren(make("div", "nos-faint nos-empty", "the result appears here"));
    this.wrong.replaceChildren();
    this.timing.textContent = "";
    this.#write();
  }

  #change() {
    this.#write();
    if (!this.live.checked) return;
    this.isChanged = true;
    if (this.call === null && this.timer === undefined) this.timer = setTimeout(() => this.#again(), WAIT_MS);
  }

  #again() {
    this.timer = undefined;
    if (this.call === null && this.isChanged) this.run();
  }

  /** The `%nos run` line that does the same. */
  #write() {
    const words = ["%nos run", this.model.name];
    if (this.method.name !== "__call__") words.push("-m", this.method.name);
    for (const [name, input] of this.inputs) {
      const shown = input.field?.value || input.select?.value;
      if (shown && shown !== input.parameter?.default) words.push("-i", `${name}={${JSON.stringify(Number(shown) || shown)}}`);
      else if (input.parameter?.is_required) words.push("-i", `${name}=$${name}`);
    }
    this.code.textContent = words.join(" ");
  }

  async run() {
    if (this.call !== null || !this.method) return;
    const id = this.post.name();
    this.call = id;
    this.isChanged = false;
    this.began = performance.now();
    this.runner.disabled = true;
    this.root.dataset.call = "running";
    try {
      /** @type {Record<string, any>} */ const filled = {};
      /** @type {ArrayBuffer[]} */ const buffers = [];
      for (const [name, input] of this.inputs) {
        const entry = await input.read();
        if (entry === undefined) continue;
        filled[name] = entry.buffer ? { buffer: buffers.push(entry.buffer) - 1, as: entry.as } : entry;
      }
      this.isFirst = true;
      this.stopper.disabled = false;
      await this.post.send({ type: "run", id, model: this.model.name, method: this.method.name, arguments: filled }, buffers);
    } catch (error) {
      this.#end();
      this.live.checked &&= false;
      this.wrong.replaceChildren(errorBox("", /** @type {Error} */ (error).message, null));
    }
  }

  /** The backend went away: what was under way has no answer any more. */
  lose() {
    if (this.call === null) return;
    this.#end();
    this.wrong.replaceChildren(errorBox("", "the backend went away during the call", () => this.run()));
  }

  #end() {
    this.call = null;
    this.runner.disabled = false;
    this.stopper.disabled = true;
    this.root.dataset.call = "idle";
  }

  /** @param {any} message @param {DataView[]} buffers */
  take(message, buffers) {
    if (message.id !== this.call || this.call === null) return;
    if (message.type === "result") {
      const picture = [...this.inputs.values()].map((input) => input.picture?.()).find(Boolean);
      showResult(this.place, message.view, buffers[0], picture);
    }
    if (message.type === "item") {
      if (this.isFirst) {
        release(this.place);
        this.place.replaceChildren();
      }
      this.isFirst = false;
      addItem(this.place, message.view, buffers[0]);
    }
    if (message.type === "done") {
      const page_ms = performance.now() - this.began;
      this.wrong.replaceChildren();
      this.timing.textContent = `${(message.total_s * 1e3).toFixed(message.total_s < 0.01 ? 1 : 0)} ms, ${page_ms.toFixed(0)} ms with the page`;
      this.root.dataset.pageMs = page_ms.toFixed(1);
      this.root.dataset.runs = String(Number(this.root.dataset.runs) + 1);
      this.#end();
      const isLive = this.live.checked && ([...this.inputs.values()].some((input) => input.video) || this.isChanged);
      if (isLive) this.#next();
    }
    if (message.type === "failed") {
      this.#end();
      this.wrong.replaceChildren(errorBox(message.name, message.sentence, () => this.run(), message.traceback));
    }
  }

  #next() {
    requestAnimationFrame(() => this.run());
  }

  close() {
    clearTimeout(this.timer);
    this.inputs.forEach((input) => input.close());
    release(this.place);
  }
}
