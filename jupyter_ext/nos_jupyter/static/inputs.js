// @ts-check
// Inputs, one class per control of a form. Each has `root`, and `read()`: what goes into a call.
//
// read() gives undefined where the parameter is left to its default, else {value} or {text} or {buffer, as};
// it throws an Error with a sentence where something is missing.

import { button, labelled, make, suppressShortcuts } from "./page.js";
import { openMicrophone } from "./microphone.js";
import { hintOf, missing } from "./parameters.js";
import { DrawingInput, ImageInput } from "./pictures.js";

/** @typedef {import("./parameters.js").Parameter} Parameter */

/** @param {Parameter} parameter @param {() => void} changed */
export function makeInput(parameter, changed) {
  const kinds = { text: LinesInput, lines: LinesInput, integer: NumberInput, real: NumberInput, flag: FlagInput, choice: ChoiceInput, image: ImageInput, drawing: DrawingInput, file: FileInput };
  const Input = kinds[/** @type {keyof typeof kinds} */ (parameter.control)] ?? JsonInput;
  return new Input(parameter, changed);
}

class LinesInput {
  /** @param {Parameter} parameter @param {() => void} changed */
  constructor(parameter, changed) {
    this.parameter = parameter;
    this.area = make("textarea", "nos-area");
    this.area.rows = parameter.control === "lines" ? 4 : 3;
    this.area.placeholder = parameter.control === "lines" ? "one text per line" : "text";
    this.area.addEventListener("input", changed);
    this.root = labelled(parameter.name, this.area, hintOf(parameter));
  }

  read() {
    const text = this.area.value;
    if (!text) return missing(this.parameter);
    return { value: this.parameter.control === "lines" ? text.split("\n").filter(Boolean) : text };
  }

  close() {}
}

class NumberInput {
  /** @param {Parameter} parameter @param {() => void} changed */
  constructor(parameter, changed) {
    this.parameter = parameter;
    this.field = make("input", "nos-field");
    this.field.type = "number";
    this.field.step = parameter.control === "integer" ? "1" : "any";
    this.field.value = Number.isFinite(Number(parameter.default)) ? parameter.default : "";
    this.field.addEventListener("input", changed);
    this.root = labelled(parameter.name, this.field, hintOf(parameter));
  }

  read() {
    if (this.field.validity.badInput) throw new Error(`${this.parameter.name} expects a ${this.parameter.wants}`);
    if (this.field.value === "") return missing(this.parameter);
    const value = Number(this.field.value);
    if (this.parameter.control === "integer" && !Number.isInteger(value)) throw new Error(`${this.parameter.name} expects a whole number`);
    return { value };
  }

  close() {}
}

class FlagInput {
  /** @param {Parameter} parameter @param {() => void} changed */
  constructor(parameter, changed) {
    this.box = make("input", "nos-check");
    this.box.type = "checkbox";
    this.box.checked = parameter.default === "True";
    this.box.addEventListener("change", changed);
    this.root = labelled(parameter.name, this.box);
    this.root.classList.add("nos-inline");
  }

  read() {
    return { value: this.box.checked };
  }

  close() {}
}

class ChoiceInput {
  /** @param {Parameter} parameter @param {() => void} changed */
  constructor(parameter, changed) {
    this.choices = parameter.choices ?? [];
    this.select = make("select", "nos-field");
    for (const choice of this.choices) {
      const option = make("option", "", String(choice));
      option.selected = parameter.default === JSON.stringify(choice) || parameter.default === `'${choice}'`;
      this.select.append(option);
    }
    this.select.addEventListener("change", changed);
    this.root = labelled(parameter.name, this.select, hintOf(parameter));
  }

  read() {
    return { value: this.choices[this.select.selectedIndex] };
  }

  close() {}
}

class JsonInput {
  /** @param {Parameter} parameter @param {() => void} changed */
  constructor(parameter, changed) {
    this.parameter = parameter;
    this.area = make("textarea", "nos-area nos-code");
    this.area.rows = 3;
    this.area.placeholder = parameter.wants === "anything" ? "JSON or text" : `JSON: ${parameter.wants}`;
    this.area.addEventListener("input", changed);
    this.root = labelled(parameter.name, this.area, hintOf(parameter));
  }

  read() {
    const text = this.area.value.trim();
    return text ? { text } : missing(this.parameter);
  }

  close() {}
}

class FileInput {
  /** @param {Parameter} parameter @param {() => void} changed */
  constructor(parameter, changed) {
    this.parameter = parameter;
    this.field = make("input", "nos-file");
    this.field.type = "file";
    this.field.setAttribute("aria-label", `${parameter.name}: a file`);
    this.field.addEventListener("change", () => {
      this.#keep(null);
      changed();
    });
    suppressShortcuts(this.field);
    /** What the microphone heard, as a WAV file; null where the file counts. @type {ArrayBuffer | null} */ this.sound = null;
    /** @type {(() => ArrayBuffer) | null} */ this.ear = null;
    this.microphone = button("Microphone", "Record sound", () => this.#listen(changed));
    this.heard = make("audio", "nos-sound");
    this.heard.controls = true;
    this.wrong = make("div", "nos-wrong");
    this.wrong.setAttribute("role", "alert");
    const bar = make("div", "nos-bar");
    bar.append(this.field, this.microphone);
    this.root = make("div", "nos-label");
    this.root.append(make("span", "nos-label-text", parameter.name), bar, this.heard, this.wrong, make("span", "nos-faint nos-hint", hintOf(parameter)));
    this.#keep(null);
  }

  /** Starts, or ends and keeps what was heard. @param {() => void} changed */
  async #listen(changed) {
    this.wrong.textContent = "";
    if (this.ear) {
      this.#keep(this.ear());
      this.#rest();
      this.field.value = "";
      changed();
      return;
    }
    try {
      this.ear = await openMicrophone((seconds) => this.ear && (this.microphone.textContent = `Stop (${Math.floor(seconds)} s)`));
    } catch (error) {
      this.wrong.textContent = /** @type {Error} */ (error).message;
      return;
    }
    this.microphone.setAttribute("aria-pressed", "true");
  }

  #rest() {
    this.ear = null;
    this.microphone.textContent = "Microphone";
    this.microphone.setAttribute("aria-pressed", "false");
  }

  /** @param {ArrayBuffer | null} sound */
  #keep(sound) {
    if (this.heard.src) URL.revokeObjectURL(this.heard.src);
    this.sound = sound;
    this.heard.hidden = !sound;
    if (sound) this.heard.src = URL.createObjectURL(new Blob([sound], { type: "audio/wav" }));
    else this.heard.removeAttribute("src");
  }

  async read() {
    const file = this.field.files?.[0];
    if (this.sound) return { buffer: this.sound, as: "bytes" };
    return file ? { buffer: await file.arrayBuffer(), as: "bytes" } : missing(this.parameter);
  }

  close() {
    this.ear?.();
    this.#rest();
    this.#keep(null);
  }
}
