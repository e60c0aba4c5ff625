// @ts-check
// RegisterModel: code in, a model out.
//
// Messages from the kernel: start {name, source, devices}, checked {id, classes, wrong}, registered {id, model},
// unregistered {id, name, sentence}, state {name, sentence}, and those of `calls.js`.
// Messages to the kernel: check {id, source}, register {id, name, source, class_name, device}.

import { StateLine, button, errorBox, labelled, live, make, suppressShortcuts } from "./page.js";
import { Calls } from "./calls.js";

const CHECK_MS = 250;

class View {
  /** @param {HTMLElement} el @param {import("./page.js").Post} post */
  constructor(el, post) {
    this.post = post;
    this.root = make("div", "nos-w nos-register");
    this.root.setAttribute("role", "group");
    this.root.setAttribute("aria-label", "Register a model");
    this.name = make("input", "nos-field");
    this.code = make("textarea", "nos-area nos-code");
    this.code.rows = 12;
    this.code.spellcheck = false;
    this.classes = make("select", "nos-field");
    this.device = make("select", "nos-field");
    this.wrong = make("div", "nos-wrong");
    this.wrong.setAttribute("role", "status");
    this.done = make("span", "nos-faint");
    this.done.setAttribute("role", "status");
    this.submit = button("Register", "Register the model", () => this.#register());
    this.submit.classList.add("nos-primary");
    this.submit.disabled = true;
    this.failure = make("div", "nos-wrong-place");
    this.cell = make("pre", "nos-cell");
    this.state = new StateLine(this.root);
    this.calls = new Calls(post);
    this.calls.root.hidden = true;
    const fields = make("div", "nos-fields");
    fields.append(labelled("name", this.name), labelled("class", this.classes), labelled("device", this.device));
    const bar = make("div", "nos-toolbar");
    bar.append(make("span", "nos-title", "Register a model"));
    const foot = make("div", "nos-bar");
    foot.append(this.submit, this.wrong, this.done);
    const same = make("details", "nos-details");
    same.append(suppressShortcuts(make("summary", "", "the cell that does the same")), this.cell);
    this.root.append(bar, fields, labelled("code", this.code), foot, this.failure, same, this.calls.root, this.state.line);
    el.append(this.root);
    this.code.addEventListener("input", () => this.#later());
    this.code.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => this.#indent(event));
    for (const field of [this.name, this.classes, this.device]) field.addEventListener("input", () => this.#write());
  }

  /** @param {KeyboardEvent} event */
  #indent(event) {
    event.stopPropagation();
    // Shift+Tab still leaves the field.
    if (event.key !== "Tab" || event.shiftKey) return;
    event.preventDefault();
    const { selectionStart, selectionEnd } = this.code;
    this.code.setRangeText("    ", selectionStart, selectionEnd, "end");
    this.#later();
  }

  #later() {
    clearTimeout(this.timer);
    this.submit.disabled = true;
    this.timer = setTimeout(() => this.#check(), CHECK_MS);
  }

  #check() {
    this.checking = this.post.name();
    this.post.send({ type: "check", id: this.checking, source: this.code.value });
  }

  #write() {
    const flags = this.classes.options.length > 1 ? ` --class ${this.classes.value}` : "";
    const device = this.device.value && this.device.value !== "auto" ? ` --device ${this.device.value}` : "";
    this.cell.textContent = `%%nos model ${this.name.value}${flags}${device}\n${this.code.value}`;
  }

  #register() {
    this.registering = this.post.name();
    this.submit.disabled = true;
    this.done.textContent = "";
    this.failure.replaceChildren();
    const { classes, device } = this;
    this.post.send({ type: "register", id: this.registering, name: this.name.value.trim(), source: this.code.value, class_name: classes.value, device: device.value });
  }

  /** @param {any} message @param {DataView[]} buffers */
  take(message, buffers) {
    if (message.type === "state") {
      this.state.show(message.name, message.sentence);
      if (message.name === "lost") this.calls.lose();
    } else if (message.type === "start" && !this.checking) {
      this.name.value = message.name;
      this.code.value = message.source;
      this.device.replaceChildren(...message.devices.map((/** @type {string} */ one) => make("option", "", one)));
      this.#check();
    } else if (message.type === "checked" && message.id === this.checking) {
      const before = this.classes.value;
      this.classes.replaceChildren(...message.classes.map((/** @type {string} */ one) => make("option", "", one)));
      if (message.classes.includes(before)) this.classes.value = before;
      this.wrong.textContent = message.wrong || (message.classes.length ? "" : "defines no class: a model is a class with public methods");
      this.submit.disabled = this.wrong.textContent !== "";
      this.#write();
    } else if (message.type === "registered" && message.id === this.registering) {
      this.submit.disabled = false;
      this.done.textContent = `registered ${message.model.name} v${message.model.version}`;
      this.calls.root.hidden = false;
      this.calls.show(message.model);
    } else if (message.type === "unregistered" && message.id === this.registering) {
      this.submit.disabled = false;
      this.failure.replaceChildren(errorBox(message.name, message.sentence, () => this.#register()));
    } else this.calls.take(message, buffers);
  }

  close() {
    clearTimeout(this.timer);
    this.calls.close();
  }
}

export default live(View);
