// @ts-check
// What every widget's page needs. `nos_jupyter.page` puts this module in front of a widget's own.
//
// All text goes through textContent: a model's name is not markup.

const ALIVE_MS = 45000;
const CHUNK_BYTES = 1 << 20;
const PARTED = "its kernel is gone: run the cell again";
export const MAX_UPLOAD_BYTES = 200 << 20;

/** @param {number} count */
export function formatBytes(count) {
  if (count < 1024) return `${Math.round(count)} B`;
  let unit = "";
  for (unit of ["KiB", "MiB", "GiB", "TiB"]) {
    count /= 1024;
    if (count < 1024) break;
  }
  return `${count.toFixed(count < 10 ? 2 : 1)} ${unit}`;
}

/** @param {string} tag @param {string} name @param {string} [text] @returns {any} */
export function make(tag, name, text) {
  const node = document.createElement(tag);
  node.className = name;
  if (text !== undefined) node.textContent = text;
  return node;
}

/** JupyterLab runs its one-letter commands unless the focused element itself says not to. @template {HTMLElement} N @param {N} node @returns {N} */
export function suppressShortcuts(node) {
  node.setAttribute("data-lm-suppress-shortcuts", "true");
  return node;
}

/** @param {string} text @param {string} label @param {() => void} act @returns {HTMLButtonElement} */
export function button(text, label, act) {
  const node = suppressShortcuts(make("button", "nos-button", text));
  node.type = "button";
  node.setAttribute("aria-label", label);
  node.addEventListener("click", act);
  return node;
}

/** A control under its label. @param {string} text @param {HTMLElement} control @param {string} [hint] */
export function labelled(text, control, hint) {
  const label = make("label", "nos-label");
  label.append(make("span", "nos-label-text", text));
  if (hint) label.append(make("span", "nos-faint nos-hint", hint));
  label.append(suppressShortcuts(control));
  return label;
}

/** A table, hidden while it has no rows. @param {string} name @param {string[]} header @param {(string | HTMLElement)[][]} rows */
export function makeTable(name, header, rows) {
  const table = make("table", `nos-table ${name}`);
  const head = table.createTHead().insertRow();
  for (const text of header) head.append(make("th", "", text));
  const body = table.createTBody();
  for (const cells of rows) {
    const row = body.insertRow();
    for (const cell of cells) row.insertCell().append(cell);
  }
  table.hidden = !rows.length;
  return table;
}

/** The line at the foot of a widget that says how the connection stands. */
export class StateLine {
  /** @param {HTMLElement} root  carries data-state */
  constructor(root) {
    this.root = root;
    this.line = make("div", "nos-status", "connecting to the backend");
    this.line.setAttribute("role", "status");
    root.dataset.state = "connecting";
  }

  /** @param {string} name @param {string} sentence */
  show(name, sentence) {
    this.root.dataset.state = name;
    if (this.line.textContent !== sentence) this.line.textContent = sentence;
  }
}

/** An error inside the widget, with a way to try again. @param {string} name @param {string} sentence @param {(() => void) | null} retry @param {string} [traceback] */
export function errorBox(name, sentence, retry, traceback) {
  const box = make("div", "nos-error");
  box.setAttribute("role", "alert");
  const line = make("div", "nos-error-line");
  line.append(make("strong", "", name), make("span", "nos-error-text", sentence));
  if (retry) line.append(button("Retry", "Try again", retry));
  box.append(line);
  if (traceback) {
    const details = make("details", "nos-details");
    details.append(suppressShortcuts(make("summary", "", "traceback of the model")), make("pre", "", traceback));
    box.append(details);
  }
  return box;
}

/** Calls back when the size of a place or the theme of the page changes. @param {HTMLElement} el @param {() => void} redraw @returns {() => void} */
export function onLook(el, redraw) {
  const resize = new ResizeObserver(redraw);
  resize.observe(el);
  const theme = new MutationObserver(redraw);
  theme.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light", "data-jp-theme-name", "class"] });
  return () => {
    resize.disconnect();
    theme.disconnect();
  };
}

/** Tells the kernel that a page shows the widget: once now, and every so often. @param {any} model @returns {() => void} */
export function keepAlive(model) {
  model.send({ type: "hello" });
  const tell = () => document.hidden || model.send({ type: "alive" });
  const living = setInterval(tell, ALIVE_MS);
  document.addEventListener("visibilitychange", tell);
  return () => {
    clearInterval(living);
    document.removeEventListener("visibilitychange", tell);
  };
}

/**
 * A widget whose views draw what the kernel says: `new View(el, post)` with `take(message, buffers)` and `close()`.
 * @param {new (el: HTMLElement, post: Post) => {take: (message: any, buffers: DataView[]) => void, close: () => void}} View
 */
export function live(View) {
  return {
    /** @param {{model: any, el: HTMLElement}} context */
    render({ model, el }) {
      const post = new Post(model);
      const view = new View(el, post);
      /** @param {any} message @param {DataView[]} buffers */
      const take = (message, buffers) => {
        post.take(message);
        view.take(message, buffers);
      };
      const part = () => view.take({ type: "state", name: "lost", sentence: PARTED }, []);
      model.on("msg:custom", take);
      // The kernel was restarted: nothing that this page says is heard any more.
      model.on("comm_live_update", part);
      const rest = keepAlive(model);
      return () => {
        rest();
        model.off("comm_live_update", part);
        model.off("msg:custom", take);
        view.close();
      };
    },
  };
}

/** Messages to the kernel. One over 10 MiB would end the page's connection to it: large buffers go in pieces. */
export class Post {
  #next = 0;
  /** @type {Map<string, () => void>} */ #waiting = new Map();

  /** @param {any} model */
  constructor(model) {
    this.model = model;
    this.page = Math.random().toString(36).slice(2, 10);
  }

  /** A name that no other page uses. */
  name() {
    return `${this.page}-${this.#next++}`;
  }

  /** @param {any} message @param {ArrayBuffer[]} [buffers] */
  async send(message, buffers = []) {
    const total = buffers.reduce((sum, one) => sum + one.byteLength, 0);
    if (total > MAX_UPLOAD_BYTES) throw new Error(`${formatBytes(total)} is more than the limit of ${formatBytes(MAX_UPLOAD_BYTES)}`);
    if (total <= CHUNK_BYTES) return this.model.send(message, undefined, buffers);
    const uploads = [];
    for (const buffer of buffers) uploads.push(await this.#upload(buffer));
    return this.model.send({ ...message, uploads });
  }

  /** @param {any} message */
  take(message) {
    if (message.type === "got") this.#waiting.get(message.upload)?.();
  }

  /** @param {ArrayBuffer} buffer */
  async #upload(buffer) {
    const upload = this.name();
    for (let at = 0; at < buffer.byteLength || at === 0; at += CHUNK_BYTES) {
      const got = new Promise((resolve) => this.#waiting.set(upload, () => resolve(null)));
      this.model.send({ type: "chunk", upload }, undefined, [buffer.slice(at, at + CHUNK_BYTES)]);
      await got;
    }
    this.#waiting.delete(upload);
    return upload;
  }
}
