// @ts-check
// InferencePanel: a form for calls of one model.
//
// Messages from the kernel: model {model, is_deleted}, state {name, sentence}, and those of `calls.js`.

import { StateLine, live, make } from "./page.js";
import { Calls } from "./calls.js";

class View {
  /** @param {HTMLElement} el @param {import("./page.js").Post} post */
  constructor(el, post) {
    this.root = make("div", "nos-w nos-panel");
    this.root.setAttribute("role", "group");
    this.root.setAttribute("aria-label", "Run a model");
    this.title = make("span", "nos-title", "…");
    this.standing = make("span", "nos-faint");
    const bar = make("div", "nos-toolbar");
    bar.append(this.title, this.standing);
    this.state = new StateLine(this.root);
    this.calls = new Calls(post);
    this.calls.root.hidden = true;
    this.root.append(bar, this.calls.root, this.state.line);
    el.append(this.root);
  }

  /** @param {any} message @param {DataView[]} buffers */
  take(message, buffers) {
    if (message.type === "state") {
      this.state.show(message.name, message.sentence);
      if (message.name === "lost") this.calls.lose();
    } else if (message.type === "model") {
      const { model, is_deleted } = message;
      this.title.textContent = model.name;
      this.standing.textContent = is_deleted ? "unregistered" : `v${model.version} · ${model.state}`;
      this.calls.root.hidden = false;
      this.calls.show(model);
    } else this.calls.take(message, buffers);
  }

  close() {
    this.calls.close();
  }
}

export default live(View);
