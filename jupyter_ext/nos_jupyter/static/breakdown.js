// @ts-check
// What one model needs: its weights and activations by module, and its activations by batch size.
//
// Messages from the kernel: profile {model, profile}, unprofiled {model, name, sentence, traceback}.

import { button, errorBox, formatBytes, make, makeTable } from "./page.js";

// The others are one line.
const MAX_MODULES = 12;

/** @typedef {{path: string, kind: string, weight_bytes: number, activation_bytes: number}} Use */

/** The modules that need most, in the model's order, and the rest as one. @param {Use[]} modules @returns {Use[]} */
export function largest(modules) {
  const needs = (/** @type {Use} */ use) => use.weight_bytes + use.activation_bytes;
  const named = new Set([...modules].sort((one, other) => needs(other) - needs(one)).slice(0, MAX_MODULES));
  const others = modules.filter((use) => !named.has(use));
  const rest = { path: others.length === 1 ? "1 other" : `${others.length} others`, kind: "", weight_bytes: 0, activation_bytes: 0 };
  for (const use of others) {
    rest.weight_bytes += use.weight_bytes;
    rest.activation_bytes += use.activation_bytes;
  }
  return [...named].sort((one, other) => modules.indexOf(one) - modules.indexOf(other)).concat(others.length ? [rest] : []);
}

export class Breakdown {
  /** @param {(model: string) => void} send  asks the kernel */
  constructor(send) {
    this.send = send;
    this.model = "";
    this.root = make("section", "nos-breakdown");
    this.root.hidden = true;
    this.title = make("span", "nos-title");
    this.note = make("span", "nos-faint");
    const bar = make("div", "nos-toolbar");
    bar.append(this.title, this.note, make("span", "nos-space"), button("Close", "Close the breakdown", () => (this.root.hidden = true)));
    this.body = make("div", "nos-columns");
    this.body.setAttribute("aria-live", "polite");
    this.root.append(bar, this.body);
  }

  /** @param {string} model */
  ask(model) {
    this.model = model;
    this.root.hidden = false;
    this.root.dataset.model = "";
    this.title.textContent = model;
    this.note.textContent = "measuring, once nobody else needs the device …";
    this.body.replaceChildren();
    this.send(model);
  }

  /** @param {any} message */
  take(message) {
    if (message.model !== this.model) return;
    this.root.dataset.model = message.model;
    if (message.type === "unprofiled") {
      this.note.textContent = "";
      this.body.replaceChildren(errorBox(message.name, message.sentence, () => this.ask(message.model), message.traceback));
      return;
    }
    const { profile } = message;
    this.note.textContent = `${formatBytes(profile.weight_bytes)} of weights · ${formatBytes(profile.activation_bytes)} of activations at most`;
    this.body.replaceChildren(...profile.methods.flatMap((/** @type {any} */ method) => [modules(method), sizes(method)]));
    for (const { note } of profile.methods) if (note) this.body.append(make("div", "nos-faint", note));
  }
}

/** @param {any} method */
function modules(method) {
  const uses = largest(method.modules);
  const most = Math.max(1, ...uses.map((use) => Math.max(use.weight_bytes, use.activation_bytes)));
  const rows = uses.map((use) => [use.path || "the model itself", bar(use.weight_bytes, most), bar(use.activation_bytes, most)]);
  const title = `${method.method}, ${method.module_rows || 1} in a batch`;
  return makeTable("nos-modules", [title, "weights", "activations"], rows);
}

/** @param {any} method */
function sizes(method) {
  const bytesOf = (/** @type {any} */ point) => point.measured_bytes || point.predicted_bytes;
  const most = Math.max(1, ...method.points.map(bytesOf));
  const rows = method.points.map((/** @type {any} */ point) => [
    point.rows === method.chosen_rows ? `${point.rows}, chosen` : String(point.rows),
    point.took_s ? `${(point.took_s * 1e3).toPrecision(3)} ms` : "not run",
    bar(bytesOf(point), most),
  ]);
  return makeTable("nos-sizes", ["in a batch", "takes", "activations"], rows);
}

/** @param {number} bytes @param {number} most */
function bar(bytes, most) {
  const box = make("span", "nos-part-bar");
  const track = make("span", "nos-bar-track");
  const fill = make("span", "nos-bar-fill");
  fill.style.width = `${(100 * bytes) / most}%`;
  track.append(fill);
  box.append(track, make("span", "nos-faint", formatBytes(bytes)));
  return box;
}
