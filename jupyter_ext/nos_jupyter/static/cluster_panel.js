// @ts-check
// ClusterPanel: workers and replicas, and the controls for both.
//
// Messages from the kernel: status {status}, done, failed {name, sentence}, state {name, sentence}.
// Messages to the kernel: scale {model, min, max}, workers {min, max}.

import { StateLine, button, errorBox, formatBytes, live, make, suppressShortcuts } from "./page.js";

const EVENTS_SHOWN = 6;
const MAX_COUNT = 64;

/** Two numbers, from and to, and what sends them. */
class Range {
  /** @param {string} label @param {number} least @param {(low: number, high: number) => void} act */
  constructor(label, least, act) {
    this.root = make("span", "nos-range");
    this.low = this.#number(`${label}: at least`, least);
    this.high = this.#number(`${label}: at most`, 1);
    this.act = act;
    this.set = button("Set", `${label}: set`, () => this.#send());
    this.root.append(this.low, make("span", "nos-faint", "to"), this.high, this.set);
  }

  /** Show what is in force, unless somebody is at it. @param {number} low @param {number} high */
  show(low, high) {
    if (this.root.dataset.edited) return;
    this.low.value = String(low);
    this.high.value = String(high);
  }

  /** @param {string} label @param {number} least */
  #number(label, least) {
    const field = suppressShortcuts(make("input", "nos-field nos-count"));
    field.type = "number";
    field.min = String(least);
    field.max = String(MAX_COUNT);
    field.value = String(least);
    field.setAttribute("aria-label", label);
    field.addEventListener("input", () => (this.root.dataset.edited = "true"));
    field.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => event.key === "Enter" && this.#send());
    return field;
  }

  #send() {
    if (!this.low.reportValidity() || !this.high.reportValidity()) return;
    delete this.root.dataset.edited;
    this.act(Number(this.low.value), Number(this.high.value));
  }
}

class ModelRow {
  /** @param {View} view @param {string} name */
  constructor(view, name) {
    this.root = make("tr", "nos-scaled");
    this.root.dataset.name = name;
    this.count = make("td", "nos-number");
    this.why = make("td", "nos-faint");
    this.range = new Range(`Replicas of ${name}`, 0, (low, high) => view.ask({ type: "scale", model: name, min: low, max: high }));
    const acts = make("td", "nos-acts");
    acts.append(this.range.root);
    this.root.append(make("td", "nos-name", name), this.count, this.why, acts);
  }

  /** @param {any} model */
  show(model) {
    this.count.textContent = `${model.num_serving} of ${model.target}`;
    const why = model.pending || model.reason;
    this.why.textContent = why;
    this.why.title = why;
    this.root.dataset.state = model.num_serving >= model.target ? "there" : "missing";
    this.range.show(model.min, model.max);
  }
}

class WorkerRow {
  constructor() {
    this.root = make("tr", "nos-worker");
    this.name = make("td", "nos-name");
    this.device = make("td", "");
    this.load = make("td", "nos-faint");
    this.text = make("span", "");
    this.fill = make("span", "nos-meter-fill");
    const meter = make("span", "nos-meter");
    meter.append(this.fill);
    this.memory = make("td", "nos-memory");
    this.memory.append(meter, this.text);
    this.root.append(this.name, this.device, this.load, this.memory);
  }

  /** @param {any} worker */
  show(worker) {
    this.root.dataset.name = worker.name;
    this.name.textContent = worker.name;
    this.device.textContent = worker.device;
    this.device.title = worker.product;
    const load = `${worker.num_running} running, ${worker.num_queued} waiting, ${worker.num_streams} streams`;
    this.load.textContent = worker.is_retiring ? `leaving · ${load}` : load;
    const isBounded = worker.capacity_bytes > 0;
    const part = isBounded ? Math.min(1, worker.used_bytes / worker.capacity_bytes) : 0;
    this.fill.style.width = `${(100 * part).toFixed(1)}%`;
    this.text.textContent = formatBytes(worker.used_bytes) + (isBounded ? ` of ${formatBytes(worker.capacity_bytes)}` : "");
  }
}

class View {
  /** @param {HTMLElement} el @param {import("./page.js").Post} post */
  constructor(el, post) {
    this.post = post;
    /** @type {Map<string, ModelRow>} */ this.models = new Map();
    /** @type {Map<string, WorkerRow>} */ this.workers = new Map();
    /** The last thing asked for. @type {any} */ this.asked = null;
    this.root = make("div", "nos-w nos-cluster");
    this.root.setAttribute("role", "group");
    this.root.setAttribute("aria-label", "Cluster");
    this.range = new Range("Workers", 1, (low, high) => this.ask({ type: "workers", min: low, max: high }));
    this.dashboard = make("a", "nos-link", "dashboard");
    this.dashboard.target = "_blank";
    this.dashboard.rel = "noopener noreferrer";
    suppressShortcuts(this.dashboard);
    const bar = make("div", "nos-toolbar");
    bar.append(make("span", "nos-title", "Workers"), this.range.root, make("span", "nos-space"), this.dashboard);
    this.workerBody = this.#table("nos-workers", ["worker", "device", "load", "memory"]);
    this.modelBody = this.#table("nos-replicas", ["model", "replicas", "why", "at least, at most"]);
    const models = make("div", "nos-toolbar");
    models.append(make("span", "nos-title", "Replicas"));
    this.empty = make("div", "nos-faint nos-empty", "no model was asked for yet");
    this.wrong = make("div", "nos-wrong-place");
    this.events = make("ul", "nos-events");
    this.events.setAttribute("aria-label", "Last events");
    this.state = new StateLine(this.root);
    this.root.append(bar, this.workerBody.parentElement, models, this.modelBody.parentElement, this.empty, this.wrong, this.events, this.state.line);
    el.append(this.root);
  }

  /** @param {any} message */
  take(message) {
    if (message.type === "state") this.state.show(message.name, message.sentence);
    else if (message.type === "status") this.#show(message.status);
    else if (message.type === "done") this.wrong.replaceChildren();
    else if (message.type === "failed") {
      const again = this.asked;
      this.wrong.replaceChildren(errorBox(message.name, message.sentence, () => this.ask(again)));
    }
  }

  /** @param {any} message */
  ask(message) {
    this.asked = message;
    this.post.send(message);
  }

  /** @param {any} status */
  #show(status) {
    this.dashboard.hidden = !status.dashboard;
    if (status.dashboard) this.dashboard.href = status.dashboard;
    this.range.show(status.workers.length, status.workers.length);
    this.#fill(this.workers, this.workerBody, status.workers, () => new WorkerRow());
    this.#fill(this.models, this.modelBody, status.models, (name) => new ModelRow(this, name));
    this.modelBody.parentElement.hidden = !status.models.length;
    this.empty.hidden = status.models.length > 0;
    const said = status.events.slice(0, EVENTS_SHOWN);
    const shown = [...this.events.children].map((node) => node.textContent);
    if (said.join("\n") !== shown.join("\n")) this.events.replaceChildren(...said.map((/** @type {string} */ text) => make("li", "", text)));
    const serving = status.models.reduce((/** @type {number} */ sum, /** @type {any} */ model) => sum + model.num_serving, 0);
    const counted = (/** @type {number} */ count, /** @type {string} */ what) => `${count} ${what}${count === 1 ? "" : "s"}`;
    this.state.show("live", `live · ${counted(status.workers.length, "worker")}, ${counted(serving, "replica")}`);
  }

  /** @param {Map<string, any>} rows @param {any} body @param {any[]} items @param {(name: string) => any} create */
  #fill(rows, body, items, create) {
    const names = new Set(items.map((item) => item.name));
    for (const [name, row] of rows) {
      if (names.has(name)) continue;
      row.root.remove();
      rows.delete(name);
    }
    for (const item of items) {
      const row = rows.get(item.name) ?? create(item.name);
      if (!rows.has(item.name)) body.append(row.root);
      rows.set(item.name, row);
      row.show(item);
    }
  }

  /** @param {string} name @param {string[]} titles */
  #table(name, titles) {
    const table = make("table", `nos-rows ${name}`);
    const head = table.createTHead().insertRow();
    for (const title of titles) head.append(make("th", "", title));
    return table.createTBody();
  }

  close() {}
}

export default live(View);
