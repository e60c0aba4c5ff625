// @ts-check
// Inputs of a form that hold a picture: a small tensor that is drawn, and an image from anywhere.

import { formatBytes, button, labelled, make, suppressShortcuts } from "./page.js";
import { closeVideo, encode, openCamera } from "./camera.js";
import { missing } from "./parameters.js";

const MAX_SIDE = 4096;
const AS_IT_IS_BYTES = 8 << 20;

/** @typedef {import("./parameters.js").Parameter} Parameter */

/** A canvas that the pointer draws on. */
class Pad {
  /** @param {HTMLCanvasElement} canvas @param {number} thickness @param {() => void} changed */
  constructor(canvas, thickness, changed) {
    this.canvas = canvas;
    this.pen = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d", { willReadFrequently: true }));
    this.thickness = thickness;
    this.isOn = true;
    /** @type {[number, number] | null} */ this.last = null;
    canvas.style.touchAction = "none";
    canvas.addEventListener("pointerdown", (event) => {
      if (!this.isOn) return;
      canvas.setPointerCapture(event.pointerId);
      this.last = this.#at(event);
      this.#line(event);
      changed();
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!this.isOn || !this.last) return;
      this.#line(event);
      changed();
    });
    for (const name of ["pointerup", "pointercancel"])
      canvas.addEventListener(name, () => {
        if (this.last) changed();
        this.last = null;
      });
  }

  clear() {
    this.pen.fillStyle = "#fff";
    this.pen.fillRect(0, 0, this.canvas.width, this.canvas.height);
  }

  /** @param {PointerEvent} event @returns {[number, number]} */
  #at(event) {
    return [(event.offsetX / this.canvas.clientWidth) * this.canvas.width, (event.offsetY / this.canvas.clientHeight) * this.canvas.height];
  }

  /** @param {PointerEvent} event */
  #line(event) {
    const to = this.#at(event);
    const from = this.last ?? to;
    this.pen.strokeStyle = "#000";
    this.pen.lineWidth = this.thickness;
    this.pen.lineCap = "round";
    this.pen.lineJoin = "round";
    this.pen.beginPath();
    this.pen.moveTo(...from);
    this.pen.lineTo(...to);
    this.pen.stroke();
    this.last = to;
  }
}

/** A small tensor, drawn by hand: what the model gets is shown beside. */
export class DrawingInput {
  /** @param {Parameter} parameter @param {() => void} changed */
  constructor(parameter, changed) {
    this.parameter = parameter;
    const { height, width } = parameter;
    const cell = Math.max(4, Math.round(224 / Math.max(height, width)));
    this.canvas = suppressShortcuts(make("canvas", "nos-pad"));
    this.canvas.width = width * cell;
    this.canvas.height = height * cell;
    this.canvas.tabIndex = 0;
    this.canvas.setAttribute("role", "img");
    this.canvas.setAttribute("aria-label", `Draw ${parameter.name}, ${height} x ${width}, with the pointer; Delete clears it`);
    this.seen = make("canvas", "nos-seen");
    this.seen.width = width;
    this.seen.height = height;
    this.seen.setAttribute("aria-hidden", "true");
    this.isEmpty = true;
    const drawn = () => {
      this.isEmpty = false;
      this.#show();
      changed();
    };
    this.pad = new Pad(this.canvas, Math.max(2, cell * Math.max(1, Math.min(height, width) / 8) * 1.4), drawn);
    this.pad.clear();
    const clear = () => {
      this.pad.clear();
      this.isEmpty = true;
      this.#show();
    };
    this.canvas.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
      if (event.key === "Delete" || event.key === "Backspace") clear();
    });
    this.ink = make("input", "nos-field nos-short");
    this.ink.type = "number";
    this.ink.step = "any";
    this.ink.value = String(parameter.ink);
    this.ink.addEventListener("input", changed);
    const side = make("div", "nos-side");
    side.append(make("span", "nos-faint nos-hint", "as the model sees it"), this.seen, labelled("value of ink", this.ink), button("Clear", `Clear ${parameter.name}`, clear));
    this.root = make("div", "nos-label");
    this.root.append(make("span", "nos-label-text", parameter.name), make("span", "nos-faint nos-hint", "draw here"));
    const row = make("div", "nos-row");
    row.append(this.canvas, side);
    this.root.append(row);
    this.#show();
  }

  /** The mean darkness of each cell, 0 to 1. */
  #cells() {
    const { height, width } = this.parameter;
    const { data } = this.pad.pen.getImageData(0, 0, this.canvas.width, this.canvas.height);
    const cell = this.canvas.width / width;
    const found = new Float32Array(height * width);
    for (let y = 0; y < this.canvas.height; y++)
      for (let x = 0; x < this.canvas.width; x++)
        found[Math.floor(y / cell) * width + Math.floor(x / cell)] += 1 - data[4 * (y * this.canvas.width + x)] / 255;
    return found.map((sum) => sum / (cell * cell));
  }

  #show() {
    const pen = this.seen.getContext("2d");
    const image = pen.createImageData(this.seen.width, this.seen.height);
    this.#cells().forEach((darkness, at) => image.data.set([255 * (1 - darkness), 255 * (1 - darkness), 255 * (1 - darkness), 255], 4 * at));
    pen.putImageData(image, 0, 0);
  }

  read() {
    if (this.isEmpty && this.parameter.is_required) throw new Error(`${this.parameter.name} is empty: draw something`);
    const { paper } = this.parameter;
    const ink = Number(this.ink.value);
    const pixels = this.#cells().map((darkness) => paper + darkness * (ink - paper));
    return { buffer: pixels.buffer, as: "pixels" };
  }

  close() {}
}

/** An image: from a file, the clipboard, a drop, the camera, or drawn. */
export class ImageInput {
  /** @param {Parameter} parameter @param {() => void} changed */
  constructor(parameter, changed) {
    this.parameter = parameter;
    this.changed = changed;
    /** The file to send as it is; null where the canvas holds the picture. @type {File | Blob | null} */ this.file = null;
    /** @type {HTMLVideoElement | null} */ this.video = null;
    this.isEmpty = true;
    this.scratch = document.createElement("canvas");
    this.root = make("div", "nos-label");
    this.canvas = make("canvas", "nos-picture");
    this.pad = new Pad(this.canvas, 10, () => {
      this.file = null;
      changed();
    });
    this.pad.isOn = false;
    this.zone = suppressShortcuts(make("div", "nos-zone"));
    this.zone.tabIndex = 0;
    this.zone.setAttribute("role", "group");
    this.zone.setAttribute("aria-label", `${parameter.name}: drop or paste an image here`);
    this.note = make("div", "nos-zone-note", "drop or paste an image here");
    this.zone.append(this.note, this.canvas);
    this.canvas.hidden = true;
    this.wrong = make("div", "nos-wrong");
    this.wrong.setAttribute("role", "alert");
    this.said = make("div", "nos-faint nos-hint");
    this.said.setAttribute("role", "status");
    const picker = make("input", "nos-hidden");
    picker.type = "file";
    picker.accept = "image/*";
    picker.tabIndex = -1;
    picker.addEventListener("change", () => picker.files?.[0] && this.#open(picker.files[0]));
    this.picker = picker;
    this.camera = button("Webcam", "Use the camera", () => this.#toggleCamera());
    const bar = make("div", "nos-bar");
    bar.append(
      button("File…", "Choose an image file", () => picker.click()),
      this.camera,
      button("Draw", "Draw the image by hand", () => this.#draw()),
      button("Clear", `Clear ${parameter.name}`, () => this.#clear()),
      picker,
    );
    this.root.append(make("span", "nos-label-text", parameter.name), bar, this.zone, this.wrong, this.said);
    this.zone.addEventListener("dragover", (/** @type {DragEvent} */ event) => event.preventDefault());
    this.zone.addEventListener("drop", (/** @type {DragEvent} */ event) => {
      event.preventDefault();
      event.stopPropagation();
      const file = event.dataTransfer?.files[0];
      if (file) this.#open(file);
    });
    this.zone.addEventListener("paste", (/** @type {ClipboardEvent} */ event) => {
      const file = event.clipboardData?.files[0];
      event.preventDefault();
      event.stopPropagation();
      if (file) this.#open(file);
      else this.wrong.textContent = "the clipboard holds no image";
    });
  }

  /** @param {File} file */
  async #open(file) {
    this.#stopCamera();
    this.wrong.textContent = this.said.textContent = "";
    let bitmap;
    try {
      bitmap = await createImageBitmap(file);
    } catch {
      this.wrong.textContent = `${file.name} (${file.type || "of no known type"}) is no image that this browser reads`;
      return;
    }
    const scale = Math.min(1, MAX_SIDE / Math.max(bitmap.width, bitmap.height));
    this.canvas.width = Math.round(bitmap.width * scale);
    this.canvas.height = Math.round(bitmap.height * scale);
    this.pad.pen.drawImage(bitmap, 0, 0, this.canvas.width, this.canvas.height);
    const fits = scale === 1 && file.size <= AS_IT_IS_BYTES && ["image/jpeg", "image/png"].includes(file.type);
    this.file = fits ? file : null;
    if (!fits && file.size > AS_IT_IS_BYTES)
      this.said.textContent = `${file.name} has ${formatBytes(file.size)}: sent as JPEG, ${this.canvas.width} x ${this.canvas.height}`;
    this.pad.isOn = false;
    this.#fill();
    this.changed();
  }

  #draw() {
    this.#stopCamera();
    this.canvas.width = 320;
    this.canvas.height = 240;
    this.pad.clear();
    this.pad.isOn = true;
    this.file = null;
    this.#fill();
  }

  #fill() {
    this.canvas.hidden = false;
    this.note.hidden = true;
    this.isEmpty = false;
  }

  #clear() {
    this.#stopCamera();
    this.canvas.hidden = true;
    this.note.hidden = false;
    this.isEmpty = true;
    this.file = null;
    this.wrong.textContent = this.said.textContent = "";
    this.picker.value = "";
  }

  async #toggleCamera() {
    if (this.video) {
      this.#stopCamera();
      return;
    }
    this.wrong.textContent = "";
    try {
      this.video = await openCamera();
    } catch (error) {
      this.wrong.textContent = /** @type {Error} */ (error).message;
      return;
    }
    this.camera.textContent = "Freeze";
    this.camera.setAttribute("aria-label", "Take the picture that the camera sees now");
    this.canvas.width = this.video.videoWidth;
    this.canvas.height = this.video.videoHeight;
    this.pad.isOn = false;
    this.file = null;
    this.#fill();
    const paint = () => {
      if (!this.video) return;
      this.pad.pen.drawImage(this.video, 0, 0, this.canvas.width, this.canvas.height);
      requestAnimationFrame(paint);
    };
    paint();
    this.changed();
  }

  #stopCamera() {
    closeVideo(this.video);
    this.video = null;
    this.camera.textContent = "Webcam";
    this.camera.setAttribute("aria-label", "Use the camera");
  }

  /** What is shown; null where nothing is. */
  picture() {
    return this.isEmpty ? null : this.canvas;
  }

  async read() {
    if (this.isEmpty) return missing(this.parameter);
    // Of a camera, too, what is shown: a later frame is another picture.
    const blob = this.file ?? (await encode(this.canvas, this.scratch));
    return { buffer: await blob.arrayBuffer(), as: "media" };
  }

  close() {
    this.#stopCamera();
  }
}
