// @ts-check
// ModelBrowser: the catalogue as a table.
//
// Messages from the kernel: models {models}, model {model}, gone {name}, moved {model, act},
// unmoved {model, act, name, sentence}, state {name, sentence}, and those of `calls.js`.
// Messages to the kernel: load {name}, unload {name}, and those of `calls.js`.

import { StateLine, button, errorBox, formatBytes, live, make, suppressShortcuts } from "./page.js";
import { Calls } from "./calls.js";

const ON_DEVICE = "device";

class Row {
  /** @param {View} view */
  constructor(view) {
    this.view = view;
    this.root = make("tr", "nos-model");
    this.name = make("div", "nos-model-name");
    this.about = make("div", "nos-faint nos-model-about");
    const what = make("td", "");
    what.append(this.name, this.about);
    this.state = make("td", "nos-model-state");
    this.bytes = make("td", "nos-model-bytes");
    this.move = button("Load", "", () => this.view.move(this));
    this.open = button("Open", "", () => this.view.open(this.model.name));
    const acts = make("td", "nos-model-acts");
    acts.append(this.move, this.open);
    this.root.append(what, this.state, this.bytes, acts);
    /** What it is doing: `load`, `unload` or nothing. */ this.act = "";
  }

  /** @param {any} model */
  show(model) {
    this.model = model;
    const isThere = model.state === ON_DEVICE;
    this.root.dataset.name = model.name;
    this.root.dataset.state = model.state;
    this.name.textContent = model.name;
    this.name.title = `v${model.version}, of ${model.owner}`;
    this.state.replaceChildren(make("span", `nos-dot nos-is-${model.state}`), model.state);
    this.state.title = model.error || model.devices.join(", ");
    this.bytes.textContent = model.device_bytes ? formatBytes(model.device_bytes) : model.host_bytes ? formatBytes(model.host_bytes) : "";
    this.about.textContent = model.error || model.doc;
    const busy = this.act ? `${this.act === "load" ? "loading" : "unloading"}…` : "";
    this.move.textContent = busy || (isThere ? "Unload" : "Load");
    this.move.disabled = Boolean(busy) || model.state === "loading";
    this.move.setAttribute("aria-label", `${isThere ? "Unload" : "Load"} ${model.name}`);
    this.open.setAttribute("aria-label", `Open a form for ${model.name}`);
  }
}

class View {
  /** @param {HTMLElement} el @param {import("./page.js").Post} post */
  constructor(el, post) {
    this.post = post;
    /** @type {Map<string, Row>} */ this.rows = new Map();
    this.root = make("div", "nos-w nos-browser");
    this.root.setAttribute("role", "group");
    this.root.setAttribute("aria-label", "Models");
    this.search = suppressShortcuts(make("input", "nos-field nos-search"));
    this.search.type = "search";
    this.search.placeholder = "search";
    this.search.setAttribute("aria-label", "Search models");
    this.search.addEventListener("input", () => this.draw());
    this.loaded = suppressShortcuts(make("input", "nos-check"));
    this.loaded.type = "checkbox";
    this.loaded.addEventListener("change", () => this.draw());
    const only = make("label", "nos-inline");
    only.append(this.loaded, "on a device");
    const bar = make("div", "nos-toolbar");
    bar.append(make("span", "nos-title", "Models"), make("span", "nos-space"), this.search, only);
    const table = make("table", "nos-models");
    const head = table.createTHead().insertRow();
    for (const name of ["model", "state", "memory", ""]) head.append(make("th", "", name));
    this.body = table.createTBody();
    const scroll = make("div", "nos-scroll");
    scroll.append(table);
    this.empty = make("div", "nos-faint nos-empty", "no model");
    this.wrong = make("div", "nos-wrong-place");
    this.state = new StateLine(this.root);
    this.calls = new Calls(post);
    this.opened = make("section", "nos-opened");
    this.openedName = make("span", "nos-title");
    const openedBar = make("div", "nos-toolbar");
    openedBar.append(this.openedName, make("span", "nos-space"), button("Close", "Close the form", () => (this.opened.hidden = true)));
    this.opened.append(openedBar, this.calls.root);
    this.opened.hidden = true;
    this.root.append(bar, scroll, this.empty, this.wrong, this.opened, this.state.line);
    el.append(this.root);
  }

  /** @param {any} message @param {DataView[]} buffers */
  take(message, buffers) {
    if (message.type === "state") {
      this.lost = message.name === "lost";
      this.state.show(message.name, message.sentence);
      if (this.lost) this.calls.lose();
      this.#sayCount();
    } else if (message.type === "models") {
      this.rows.clear();
      message.models.forEach((/** @type {any} */ model) => this.#put(model));
      this.draw();
    } else if (message.type === "model") {
      if (this.lost) this.rows.clear();
      this.lost = false;
      this.#put(message.model);
      this.draw();
    } else if (message.type === "gone") {
      this.rows.delete(message.name);
      this.draw();
    } else if (message.type === "moved" || message.type === "unmoved") {
      const row = this.rows.get(message.model);
      if (row) {
        row.act = "";
        row.show(row.model);
      }
      const retry = () => row && this.move(row);
      this.wrong.replaceChildren(...(message.type === "unmoved" ? [errorBox(message.name, message.sentence, retry)] : []));
    } else this.calls.take(message, buffers);
  }

  /** @param {any} model */
  #put(model) {
    const row = this.rows.get(model.name) ?? new Row(this);
    this.rows.set(model.name, row);
    row.show(model);
    if (!this.opened.hidden && this.calls.model?.name === model.name) this.calls.show(model);
  }

  draw() {
    const wanted = this.search.value.toLowerCase();
    const shown = [...this.rows.values()]
      .filter((row) => row.model.name.toLowerCase().includes(wanted) && (!this.loaded.checked || row.model.state === ON_DEVICE))
      .sort((one, other) => (one.model.name < other.model.name ? -1 : 1))
      .map((row) => row.root);
    const isSame = shown.length === this.body.children.length && shown.every((root, at) => root === this.body.children[at]);
    // Moving a row would take the focus from its buttons.
    if (!isSame) this.body.replaceChildren(...shown);
    this.empty.hidden = shown.length > 0;
    this.#sayCount();
  }

  #sayCount() {
    if (this.root.dataset.state !== "live") return;
    const there = [...this.rows.values()].filter((row) => row.model.state === ON_DEVICE).length;
    this.state.show("live", `live · ${this.rows.size} models, ${there} on a device`);
  }

  /** @param {Row} row */
  move(row) {
    row.act = row.model.state === ON_DEVICE ? "unload" : "load";
    row.show(row.model);
    this.post.send({ type: row.act, name: row.model.name });
  }

  /** @param {string} name */
  open(name) {
    const row = this.rows.get(name);
    if (!row) return;
    this.opened.hidden = false;
    this.openedName.textContent = name;
    this.calls.show(row.model);
    this.opened.scrollIntoView({ block: "nearest" });
  }

  close() {
    this.calls.close();
  }
}

export default live(View);
