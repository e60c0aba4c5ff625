// @ts-check
// Results by type, as `nos_jupyter.rendering` describes them.

import { make, makeTable } from "./page.js";

const MAX_BARS = 12;
const MARKERS = ["#4c8dd6", "#e08a3c", "#3fa37c", "#c05fa0", "#8f7fd8", "#c9a227", "#4fb3bf", "#d65c5c"];
const MASK_ALPHA = 110;

/** @typedef {HTMLCanvasElement | ImageBitmap | null} Picture */

/** Draws a value, in place of what was there. @param {HTMLElement} place @param {any} view @param {DataView | undefined} data @param {Picture} [picture]  in which boxes and masks lie */
export function showResult(place, view, data, picture = null) {
  if (view.kind === "text" && place.firstElementChild?.className === "nos-text") {
    place.firstElementChild.textContent = view.text;
    return;
  }
  if (view.kind === "scores" && /** @type {any} */ (place.firstElementChild)?.update?.(view)) return;
  release(place);
  place.replaceChildren(draw(view, data, picture));
}

/** Adds an item of a generator: text is appended to the text before. @param {HTMLElement} place @param {any} view @param {DataView | undefined} data */
export function addItem(place, view, data) {
  const last = place.lastElementChild;
  if (view.kind === "text" && last?.className === "nos-text") last.textContent += view.text;
  else place.append(draw(view, data));
  place.scrollTop = place.scrollHeight;
}

/** Gives back what pictures hold. @param {HTMLElement} place */
export function release(place) {
  place.querySelectorAll("img, audio").forEach((/** @type {any} */ node) => URL.revokeObjectURL(node.src));
}

/** @param {any} view @param {DataView | undefined} data @param {Picture} [picture] @returns {HTMLElement} */
function draw(view, data, picture = null) {
  if (view.kind === "image") return drawFile(view, data);
  if (view.kind === "audio") return drawSound(view, data);
  if (view.kind === "overlay") return drawOverlay(make("canvas", "nos-picture"), view, bytesOf(data), picture);
  if (view.kind === "pixels") return drawPixels(make("canvas", "nos-picture"), view.shape, bytesOf(data));
  if (view.kind === "scores") return drawScores(view);
  if (view.kind === "table") return makeTable("", view.header, view.rows);
  if (view.kind === "text") return make("div", "nos-text", view.text);
  const box = make("div", "nos-array");
  if (view.title) box.append(make("div", "nos-faint", view.title));
  box.append(make("pre", "", view.text));
  return box;
}

/** @param {DataView | undefined} data */
function bytesOf(data) {
  return data ? new Uint8Array(data.buffer, data.byteOffset, data.byteLength) : new Uint8Array();
}

/** @param {any} view @param {DataView | undefined} data */
function drawFile(view, data) {
  const image = make("img", "nos-picture");
  image.alt = "result";
  image.src = URL.createObjectURL(new Blob([bytesOf(data)], { type: view.mime_type }));
  return image;
}

/** @param {any} view @param {DataView | undefined} data */
function drawSound(view, data) {
  const player = make("audio", "nos-sound");
  player.controls = true;
  player.setAttribute("aria-label", "The sound that came out");
  player.src = URL.createObjectURL(new Blob([bytesOf(data)], { type: view.mime_type }));
  return player;
}

/** Draws what was found over the picture that it was found in, or on nothing. @param {HTMLCanvasElement} canvas @param {any} view @param {Uint8Array} masks @param {Picture} picture */
export function drawOverlay(canvas, view, masks, picture) {
  const [, tall, wide] = view.masks;
  const ends = view.boxes.flatMap((/** @type {number[]} */ box) => [[box[2], box[3]]]);
  const width = picture?.width || wide || Math.ceil(Math.max(1, ...ends.map((/** @type {number[]} */ end) => end[0])));
  const height = picture?.height || tall || Math.ceil(Math.max(1, ...ends.map((/** @type {number[]} */ end) => end[1])));
  resize(canvas, width, height);
  canvas.dataset.found = String(Math.max(view.boxes.length, view.masks[0]));
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `${canvas.dataset.found} found: ${view.labels.join(", ")}`);
  const pen = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  pen.clearRect(0, 0, width, height);
  if (picture) pen.drawImage(picture, 0, 0);
  if (masks.length) pen.drawImage(tinted(view.masks, masks), 0, 0, width, height);
  const unit = Math.max(1, width / 320);
  pen.lineWidth = 2 * unit;
  pen.font = `${Math.round(11 * unit)}px sans-serif`;
  pen.textBaseline = "top";
  view.boxes.forEach((/** @type {number[]} */ [left, top, right, bottom], /** @type {number} */ at) => {
    const color = MARKERS[at % MARKERS.length];
    pen.strokeStyle = color;
    pen.strokeRect(left, top, right - left, bottom - top);
    const score = view.scores[at];
    const text = [view.labels[at], typeof score === "number" ? score.toFixed(2) : ""].filter(Boolean).join(" ");
    if (!text) return;
    const tag = 15 * unit;
    const above = Math.max(0, top - tag);
    pen.fillStyle = color;
    pen.fillRect(left - unit, above, pen.measureText(text).width + 8 * unit, tag);
    pen.fillStyle = "#fff";
    pen.fillText(text, left + 3 * unit, above + 2 * unit);
  });
  return canvas;
}

/** Setting a size clears a canvas, and costs even where nothing changes. @param {HTMLCanvasElement} canvas @param {number} width @param {number} height */
function resize(canvas, width, height) {
  if (canvas.width !== width) canvas.width = width;
  if (canvas.height !== height) canvas.height = height;
}

/** Masks as one picture, each in its colour. @param {number[]} shape @param {Uint8Array} masks */
function tinted([count, height, width], masks) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  const image = new ImageData(width, height);
  const words = new Uint32Array(image.data.buffer);
  for (let index = 0, from = 0; index < count; index++) {
    const color = parseInt(MARKERS[index % MARKERS.length].slice(1), 16);
    const word = ((MASK_ALPHA << 24) | ((color & 0xff) << 16) | (color & 0xff00) | (color >> 16)) >>> 0;
    for (let at = 0; at < words.length; at++, from++) if (masks[from]) words[at] = word;
  }
  canvas.getContext("2d")?.putImageData(image, 0, 0);
  return canvas;
}

/** What each canvas was last drawn from: live frames are drawn on it again, or 30 MB a second would be thrown away. @type {WeakMap<HTMLCanvasElement, ImageData>} */
const lastPixels = new WeakMap();

/** Draws rows of pixels of 1, 3 or 4 channels. @param {HTMLCanvasElement} canvas @param {number[]} shape @param {Uint8Array} bytes */
export function drawPixels(canvas, shape, bytes) {
  const [height, width, channels = 1] = shape;
  resize(canvas, width, height);
  const last = lastPixels.get(canvas);
  const image = last?.width === width && last.height === height ? last : new ImageData(width, height);
  lastPixels.set(canvas, image);
  const words = new Uint32Array(image.data.buffer);
  if (channels === 1) for (let at = 0; at < words.length; at++) words[at] = 0xff000000 | (bytes[at] * 0x10101);
  else if (channels === 4) image.data.set(bytes);
  else for (let at = 0, from = 0; at < words.length; at++, from += 3) words[at] = 0xff000000 | (bytes[from + 2] << 16) | (bytes[from + 1] << 8) | bytes[from];
  canvas.getContext("2d")?.putImageData(image, 0, 0);
  return canvas;
}

/** Bars, in the order of the classes; where there are many, the largest first. @param {{labels: string[], values: number[]}} view */
function drawScores(view) {
  const chart = make("div", "nos-scores");
  chart.setAttribute("role", "img");
  const isShort = view.labels.length <= MAX_BARS;
  const rows = view.labels.slice(0, MAX_BARS).map(() => {
    const row = make("div", "nos-score");
    const bar = make("span", "nos-bar-track");
    const parts = { label: make("span", "nos-score-label"), fill: make("span", "nos-bar-fill"), value: make("span", "nos-faint nos-score-value") };
    bar.append(parts.fill);
    row.append(parts.label, bar, parts.value);
    chart.append(row);
    return { row, ...parts };
  });
  const count = view.labels.length;
  chart.update = (/** @type {{labels: string[], values: number[]}} */ { labels, values }) => {
    if (labels.length !== count) return false;
    const ranked = labels.map((_, at) => at).sort((one, other) => values[other] - values[one]);
    const scale = Math.max(1, ...values.map(Math.abs));
    (isShort ? labels.map((_, at) => at) : ranked.slice(0, MAX_BARS)).forEach((at, place) => {
      rows[place].label.textContent = labels[at];
      rows[place].fill.style.width = `${(Math.max(0, values[at]) / scale) * 100}%`;
      rows[place].value.textContent = values[at].toFixed(3);
      rows[place].row.classList.toggle("nos-best", at === ranked[0]);
    });
    chart.dataset.best = labels[ranked[0]];
    chart.setAttribute("aria-label", `Scores of ${count} classes; the best is ${labels[ranked[0]]}, ${values[ranked[0]].toFixed(3)}`);
    return true;
  };
  chart.update(view);
  return chart;
}
