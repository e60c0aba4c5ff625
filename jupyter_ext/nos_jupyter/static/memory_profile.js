// @ts-check
// MemoryProfile: device bytes by model over time, stacked on one canvas per device.
//
// Messages from the kernel: history {samples, marks}, sample {sample}, mark {mark}, state {name, sentence},
// and those of `breakdown.js`.
// Messages to the kernel: hello (this page wants the history), alive (this page still shows the widget), profile {model}.

import { StateLine, button, formatBytes, keepAlive, make, onLook, suppressShortcuts } from "./page.js";
import { Breakdown } from "./breakdown.js";

/** @typedef {[string, number]} Part  a model's name and its bytes */
/** @typedef {{worker: string, name: string, product: string, capacity: number, used: number, models: Part[]}} Device */
/** @typedef {{t: number, devices: Device[]}} Sample */
/** @typedef {{t: number, kind: string, model: string}} Mark */

const PALETTE = ["#4c8dd6", "#e08a3c", "#3fa37c", "#c05fa0", "#8f7fd8", "#c9a227", "#4fb3bf", "#d65c5c"];
const OTHER_COLOR = "#8a8f98";
const OTHER = "contexts, activations";
const RANGES = [["1 min", 60], ["5 min", 300], ["10 min", 600]];
const MAX_SAMPLES = 1200;
const MAX_MARKS = 200;
const HEIGHT = 150;
const MARGIN = { left: 62, right: 10, top: 18, bottom: 20 };
// Samples come every 0.5 s; a longer silence is drawn as one.
const GAP_S = 3;
const STALE_MS = 4000;

/** The end of the axis: the smallest 1, 2, 3, 4, 6 or 8 times a power of two that holds the peak with some air. @param {number} peak @param {number} capacity */
export function axisEnd(peak, capacity) {
  if (capacity > 0 && peak > capacity / 2) return Math.max(capacity, peak);
  const wanted = Math.max(peak * 1.15, 4096);
  const power = 2 ** Math.floor(Math.log2(wanted));
  for (const factor of [1, 1.5, 2]) if (power * factor >= wanted) return power * factor;
  return power * 2;
}

/** @param {Device} device @returns {Part[]} */
export function parts(device) {
  const known = device.models.reduce((sum, [, bytes]) => sum + bytes, 0);
  const other = device.used - known;
  return other > 0 ? [...device.models, [OTHER, other]] : device.models;
}

/** @param {Device} device */
const keyOf = (device) => `${device.worker} ${device.name}`;

/** What all views of one widget share: the samples and the colour of each model. */
class Store {
  constructor() {
    /** @type {Sample[]} */ this.samples = [];
    /** @type {Mark[]} */ this.marks = [];
    /** @type {Map<string, string>} */ this.colors = new Map([[OTHER, OTHER_COLOR]]);
    this.state = { name: "connecting", sentence: "connecting to the backend" };
    this.arrived = performance.now();
  }

  /** @param {any} message */
  take(message) {
    if (message.type === "history") {
      this.samples = message.samples;
      this.marks = message.marks;
      this.samples.forEach((sample) => this.#name(sample));
    } else if (message.type === "sample") {
      this.#name(message.sample);
      this.samples.push(message.sample);
      this.samples.splice(0, this.samples.length - MAX_SAMPLES);
      this.arrived = performance.now();
    } else if (message.type === "mark") {
      this.marks.push(message.mark);
      this.marks.splice(0, this.marks.length - MAX_MARKS);
    } else if (message.type === "state") {
      this.state = { name: message.name, sentence: message.sentence };
    }
  }

  /** @param {Sample} sample */
  #name(sample) {
    for (const device of sample.devices)
      for (const [model] of device.models)
        if (!this.colors.has(model)) this.colors.set(model, PALETTE[(this.colors.size - 1) % PALETTE.length]);
  }
}

/** One device: its heading, canvas and legend. */
class Panel {
  /** @param {View} view @param {string} key */
  constructor(view, key) {
    this.view = view;
    this.key = key;
    this.root = make("section", "nos-device");
    this.heading = make("div", "nos-heading");
    this.name = this.heading.appendChild(make("strong", "nos-device-name"));
    this.product = this.heading.appendChild(make("span", "nos-faint nos-product"));
    this.total = this.heading.appendChild(make("span", "nos-total"));
    this.canvas = make("canvas", "nos-chart");
    this.canvas.tabIndex = 0;
    this.canvas.setAttribute("role", "img");
    suppressShortcuts(this.canvas);
    this.legend = make("ul", "nos-legend");
    this.root.append(this.heading, this.canvas, this.legend);
    /** The moment under the pointer or chosen by the arrow keys. @type {number | null} */
    this.cursor = null;
    this.canvas.addEventListener("pointermove", (event) => this.#point(event.offsetX));
    this.canvas.addEventListener("pointerleave", () => this.#choose(null));
    this.canvas.addEventListener("blur", () => this.#choose(null));
    this.canvas.addEventListener("keydown", (event) => this.#press(event));
  }

  /** @returns {{t: number, device: Device}[]} */
  series() {
    const { samples, end, range } = this.view.window();
    const found = [];
    for (const sample of samples) {
      if (sample.t < end - range || sample.t > end) continue;
      const device = sample.devices.find((one) => keyOf(one) === this.key);
      if (device) found.push({ t: sample.t, device });
    }
    return found;
  }

  draw() {
    const series = this.series();
    const last = series.at(-1);
    if (!last) return;
    const shown = this.cursor === null ? last : nearest(series, this.cursor);
    const peak = series.reduce((most, { device }) => Math.max(most, device.used), 0);
    this.name.textContent = shown.device.name;
    this.product.textContent = shown.device.product;
    const total = `${formatBytes(shown.device.used)} of ${formatBytes(shown.device.capacity)}`;
    this.total.textContent = `${total} · peak ${formatBytes(peak)}`;
    this.root.dataset.usedBytes = String(shown.device.used);
    this.canvas.setAttribute(
      "aria-label",
      `Memory of ${shown.device.name} over time: ${total}, peak ${formatBytes(peak)}. Arrow keys inspect moments.`,
    );
    this.#drawLegend(parts(shown.device));
    this.#drawChart(series, axisEnd(peak, last.device.capacity), shown);
  }

  /** In the order of the stack, from below. @param {Part[]} unsorted */
  #drawLegend(unsorted) {
    const order = [...this.view.store.colors.keys()].filter((model) => model !== OTHER).concat(OTHER);
    const shown = [...unsorted].sort(([one], [other]) => order.indexOf(one) - order.indexOf(other));
    const text = JSON.stringify(shown);
    if (text === this.legend.dataset.text) return;
    this.legend.dataset.text = text;
    this.legend.replaceChildren(
      ...shown.map(([model, bytes]) => {
        const item = make("li", "nos-part");
        const swatch = make("span", "nos-swatch");
        swatch.style.background = this.view.store.colors.get(model) ?? OTHER_COLOR;
        swatch.setAttribute("aria-hidden", "true");
        const ask = () => this.view.breakdown.ask(model);
        const name = model === OTHER ? make("span", "", model) : button(model, `What ${model} needs`, ask);
        name.classList.add("nos-part-name");
        item.append(swatch, name, make("span", "nos-faint", formatBytes(bytes)));
        return item;
      }),
    );
    if (!shown.length) this.legend.append(make("li", "nos-part nos-faint", "no model on the device"));
  }

  /** @param {{t: number, device: Device}[]} series @param {number} most @param {{t: number, device: Device}} shown */
  #drawChart(series, most, shown) {
    const width = this.canvas.clientWidth;
    const scale = window.devicePixelRatio || 1;
    if (!width) return;
    if (this.canvas.width !== Math.round(width * scale)) {
      this.canvas.width = Math.round(width * scale);
      this.canvas.height = Math.round(HEIGHT * scale);
    }
    const pen = this.canvas.getContext("2d");
    if (!pen) return;
    const style = getComputedStyle(this.root);
    const ink = style.getPropertyValue("--nos-ink").trim() || style.color;
    const line = style.getPropertyValue("--nos-line").trim() || ink;
    const { end, range } = this.view.window();
    const left = MARGIN.left;
    const right = width - MARGIN.right;
    const top = MARGIN.top;
    const bottom = HEIGHT - MARGIN.bottom;
    /** @param {number} t */
    const x = (t) => right - ((end - t) / range) * (right - left);
    /** @param {number} bytes */
    const y = (bytes) => bottom - (bytes / most) * (bottom - top);

    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.clearRect(0, 0, width, HEIGHT);
    pen.font = `11px ${style.fontFamily}`;
    pen.textBaseline = "middle";
    pen.lineWidth = 1;

    pen.textAlign = "right";
    for (const share of [0, 0.5, 1]) {
      const at = Math.round(y(most * share)) + 0.5;
      pen.strokeStyle = line;
      pen.beginPath();
      pen.moveTo(left, at);
      pen.lineTo(right, at);
      pen.stroke();
      pen.fillStyle = ink;
      pen.fillText(share ? formatBytes(most * share) : "0", left - 8, at);
    }
    pen.fillStyle = ink;
    pen.textAlign = "left";
    pen.fillText(`−${range / 60} min`, left, HEIGHT - 7);
    pen.textAlign = "center";
    pen.fillText(range >= 120 ? `−${range / 120} min` : `−${range / 2} s`, (left + right) / 2, HEIGHT - 7);
    pen.textAlign = "right";
    pen.fillText("now", right, HEIGHT - 7);

    pen.save();
    pen.beginPath();
    pen.rect(left, 0, right - left, bottom);
    pen.clip();
    for (const run of runs(series)) this.#drawRun(pen, run, x, y);
    this.#drawMarks(pen, x, bottom, ink);
    pen.restore();

    if (this.cursor !== null) {
      const at = Math.round(x(shown.t)) + 0.5;
      pen.strokeStyle = ink;
      pen.beginPath();
      pen.moveTo(at, top);
      pen.lineTo(at, bottom);
      pen.stroke();
      pen.fillStyle = ink;
      pen.textAlign = at > (left + right) / 2 ? "right" : "left";
      const ago = `${Math.round(end - shown.t)} s ago`;
      pen.fillText(ago, at + (at > (left + right) / 2 ? -6 : 6), top - 9);
    }
  }

  /**
   * Draws the stack of one run of samples without a gap. Bytes change in steps, so they are drawn as steps.
   * @param {CanvasRenderingContext2D} pen @param {{t: number, device: Device}[]} run
   * @param {(t: number) => number} x @param {(bytes: number) => number} y
   */
  #drawRun(pen, run, x, y) {
    const models = [...this.view.store.colors.keys()].filter((model) => model !== OTHER);
    /** @type {number[]} */ let below = run.map(() => 0);
    for (const model of [...models, OTHER]) {
      const above = run.map(({ device }, at) => below[at] + bytesOf(device, model));
      if (above.some((bytes, at) => bytes > below[at])) {
        pen.fillStyle = this.view.store.colors.get(model) ?? OTHER_COLOR;
        pen.globalAlpha = model === OTHER ? 0.55 : 0.9;
        pen.beginPath();
        steps(pen, run, above, x, y, false);
        steps(pen, run, below, x, y, true);
        pen.closePath();
        pen.fill();
      }
      below = above;
    }
    pen.globalAlpha = 1;
  }

  /** @param {CanvasRenderingContext2D} pen @param {(t: number) => number} x @param {number} bottom @param {string} ink */
  #drawMarks(pen, x, bottom, ink) {
    const { end, range } = this.view.window();
    let free = -Infinity;
    for (const mark of this.view.store.marks) {
      if (mark.t < end - range || mark.t > end || mark.kind === "loading") continue;
      const at = Math.round(x(mark.t)) + 0.5;
      pen.strokeStyle = ink;
      pen.setLineDash([2, 3]);
      pen.beginPath();
      pen.moveTo(at, MARGIN.top - 4);
      pen.lineTo(at, bottom);
      pen.stroke();
      pen.setLineDash([]);
      const text = `${mark.kind} ${mark.model.replace(/^.*\/|@v\d+$/g, "")}`.trim();
      const needed = pen.measureText(text).width;
      const start = Math.max(MARGIN.left, Math.min(at - needed / 2, this.canvas.clientWidth - MARGIN.right - needed));
      if (start > free && this.cursor === null) {
        pen.fillStyle = ink;
        pen.textAlign = "left";
        pen.fillText(text, start, MARGIN.top - 11);
        free = start + needed + 10;
      }
    }
  }

  /** @param {number} offset */
  #point(offset) {
    const { end, range } = this.view.window();
    const span = this.canvas.clientWidth - MARGIN.left - MARGIN.right;
    this.#choose(end - (1 - (offset - MARGIN.left) / span) * range);
  }

  /** @param {number | null} moment */
  #choose(moment) {
    this.cursor = moment;
    this.draw();
  }

  /** @param {KeyboardEvent} event */
  #press(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Escape") this.#choose(null);
    if (!step) return;
    event.preventDefault();
    const { end, range } = this.view.window();
    this.#choose(Math.min(end, Math.max(end - range, (this.cursor ?? end) + (step * range) / 60)));
  }
}

/** @param {Device} device @param {string} model */
function bytesOf(device, model) {
  return parts(device).reduce((sum, [name, bytes]) => (name === model ? sum + bytes : sum), 0);
}

/** @template {{t: number}} T @param {T[]} series @param {number} moment @returns {T} */
function nearest(series, moment) {
  return series.reduce((best, one) => (Math.abs(one.t - moment) < Math.abs(best.t - moment) ? one : best));
}

/** Splits where samples are missing. @template {{t: number}} T @param {T[]} series @returns {T[][]} */
export function runs(series) {
  /** @type {T[][]} */ const found = [];
  for (const one of series) {
    const run = found.at(-1);
    const before = run?.at(-1);
    if (run && before && one.t - before.t < GAP_S) run.push(one);
    else found.push([one]);
  }
  return found;
}

/**
 * @param {CanvasRenderingContext2D} pen @param {{t: number}[]} run @param {number[]} levels
 * @param {(t: number) => number} x @param {(bytes: number) => number} y @param {boolean} backwards
 */
function steps(pen, run, levels, x, y, backwards) {
  /** @type {[number, number][]} */ const points = [];
  run.forEach(({ t }, at) => {
    if (at) points.push([x(t), y(levels[at - 1])]);
    points.push([x(t), y(levels[at])]);
  });
  if (backwards) points.reverse();
  for (const [px, py] of points) pen.lineTo(px, py);
}

/** One place on a page that shows the widget. */
class View {
  /** @param {any} model @param {Store} store @param {HTMLElement} el */
  constructor(model, store, el) {
    this.model = model;
    this.store = store;
    this.range = 60;
    /** The end of the frozen window; null while live. @type {number | null} */
    this.frozen = null;
    /** @type {Map<string, Panel>} */ this.panels = new Map();
    this.root = make("div", "nos-w nos-mem");
    this.root.setAttribute("role", "group");
    this.root.setAttribute("aria-label", "Device memory by model");
    this.state = new StateLine(this.root);
    this.devices = make("div", "nos-devices");
    this.breakdown = new Breakdown((name) => model.send({ type: "profile", model: name }));
    this.root.append(this.#toolbar(), this.devices, this.breakdown.root, this.state.line);
    el.append(this.root);
  }

  #toolbar() {
    const bar = make("div", "nos-toolbar");
    const group = make("div", "nos-group");
    group.setAttribute("role", "group");
    group.setAttribute("aria-label", "Time shown");
    for (const [text, seconds] of RANGES) {
      const choice = button(String(text), `Show the last ${text}`, () => {
        this.range = Number(seconds);
        for (const other of group.children) other.setAttribute("aria-pressed", String(other === choice));
        this.draw();
      });
      choice.setAttribute("aria-pressed", String(seconds === this.range));
      group.append(choice);
    }
    const pause = button("Pause", "Freeze the chart", () => {
      this.frozen = this.frozen === null ? this.window().end : null;
      pause.textContent = this.frozen === null ? "Pause" : "Resume";
      pause.setAttribute("aria-label", this.frozen === null ? "Freeze the chart" : "Follow again");
      this.draw();
    });
    bar.append(make("span", "nos-title", "Device memory"), make("span", "nos-space"), group, pause);
    return bar;
  }

  window() {
    const { samples } = this.store;
    return { samples, range: this.range, end: this.frozen ?? samples.at(-1)?.t ?? 0 };
  }

  draw() {
    const { samples } = this.store;
    this.root.dataset.samples = String(samples.length);
    const devices = samples.at(-1)?.devices ?? [];
    for (const device of devices) {
      const key = keyOf(device);
      if (!this.panels.has(key)) this.panels.set(key, new Panel(this, key));
    }
    const wanted = devices.map((device) => /** @type {Panel} */ (this.panels.get(keyOf(device))).root);
    if (wanted.length !== this.devices.childElementCount || wanted.some((root, at) => root !== this.devices.children[at]))
      this.devices.replaceChildren(...wanted);
    this.panels.forEach((panel) => panel.draw());
    this.drawState();
  }

  drawState() {
    let { name, sentence } = this.store.state;
    const silence = performance.now() - this.store.arrived;
    if (name === "live" && silence > STALE_MS) [name, sentence] = ["stale", "no sample from the kernel, waiting"];
    if (name === "live" && !this.store.samples.at(-1)?.devices.length) sentence = "live; no device yet: no worker has joined";
    if (this.frozen !== null && name === "live") sentence = "paused";
    this.state.show(name, sentence);
  }
}

export default () => {
  const store = new Store();
  /** @type {Set<View>} */ const views = new Set();
  return {
    /** @param {{model: any}} context */
    initialize({ model }) {
      /** @param {any} message */
      const take = (message) => {
        store.take(message);
        for (const view of views) {
          if (message.type === "profile" || message.type === "unprofiled") view.breakdown.take(message);
          else if (message.type === "state") view.drawState();
          else view.draw();
        }
      };
      model.on("msg:custom", take);
      return () => model.off("msg:custom", take);
    },
    /** @param {{model: any, el: HTMLElement}} context */
    render({ model, el }) {
      const view = new View(model, store, el);
      views.add(view);
      view.draw();
      const rest = [keepAlive(model), onLook(el, () => view.draw())];
      const ticking = setInterval(() => view.drawState(), 1000);
      return () => {
        views.delete(view);
        clearInterval(ticking);
        rest.forEach((end) => end());
      };
    },
  };
};
