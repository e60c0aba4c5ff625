// @ts-check
// StreamPlayer: live frames of a camera, a file or the kernel through a model, with what comes out.
//
// Frames go over a websocket of the Jupyter server where it uses the same backend as the kernel, else over the
// widget's own messages. Messages from the kernel: player {model, method, parameter, source, address, fps},
// state {name, sentence}; frame {seq, view, ...} and a buffer, as over the websocket.
// Messages to the kernel: begin, end, frames {headers: [{seq}]} and a buffer for each, ack {seq}, still {text} and a JPEG.

import { StateLine, button, errorBox, live, make } from "./page.js";
import { Encoder, closeVideo, encode, openCamera, openFile } from "./camera.js";
import { drawOverlay, drawPixels, release, showResult } from "./results.js";

const ROUTE = "nos/api/v1";
// Frames without an answer: one that is encoded, two at the server, one on each way.
const MAX_IN_FLIGHT = 5;
// Each message to the kernel costs page and kernel more than a frame does (both say busy and idle, the kernel in four threads): beside
// a busy cell, frames one by one came at 14 per second, three together at 24, no later. Three such messages are under way.
const TOGETHER = 3;
const MAX_IN_KERNEL = 3 * TOGETHER;
// Above it a message goes in pieces.
const TOGETHER_BYTES = 1 << 20;
// The kernel drops no frames, so that a slow model gets two, and as many more as it takes in this time.
const LIVE_S = 0.15;
const MAX_SIDE = 1280;
const ACK_EVERY = 8;
const KEPT = 60;
const SAY_MS = 500;
const GIVE_UP_MS = 3000;
const RECORDED_FPS = 30;
const RECORDED_TYPE = "video/webm";

/** Where the Jupyter server is; null on a page that is not its own. */
function server() {
  const data = document.getElementById("jupyter-config-data");
  return data ? new URL(JSON.parse(data.textContent ?? "{}").baseUrl ?? "/", location.href) : null;
}

/** Whether the Jupyter server's extension is there and uses the backend at `address`. @param {string} address @returns {Promise<URL | null>} */
async function extension(address) {
  const base = server();
  if (!base) return null;
  try {
    const answer = await fetch(new URL(`${ROUTE}/health`, base), { credentials: "same-origin" });
    return answer.ok && (await answer.json()).backend.address === address ? base : null;
  } catch {
    return null;
  }
}

/** Frames over a websocket of the Jupyter server. */
class Socket {
  /** @param {URL} base @param {any} player @param {(header: any, data: DataView) => void} take @param {(sentence: string) => void} lost */
  constructor(base, player, take, lost) {
    const url = new URL(`${ROUTE}/ws/stream/${player.model.split("/").map(encodeURIComponent).join("/")}`, base);
    url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
    this.socket = new WebSocket(url);
    this.socket.binaryType = "arraybuffer";
    this.isReady = new Promise((resolve, reject) => {
      this.socket.onopen = () => {
        this.socket.send(JSON.stringify({ method: player.method, arguments: {} }));
        resolve(null);
      };
      this.socket.onerror = () => reject(new Error("the Jupyter server refused the websocket"));
    });
    this.socket.onmessage = ({ data }) => {
      const length = new DataView(data).getUint32(0, true);
      const header = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, length)));
      take(header, new DataView(data, 4 + length));
    };
    this.socket.onclose = ({ reason }) => lost(reason || "the Jupyter server closed the websocket");
  }

  /** @param {any} header @param {ArrayBuffer} payload */
  send(header, payload) {
    const text = new TextEncoder().encode(JSON.stringify(header));
    const message = new Uint8Array(4 + text.length + payload.byteLength);
    new DataView(message.buffer).setUint32(0, text.length, true);
    message.set(text, 4);
    message.set(new Uint8Array(payload), 4 + text.length);
    if (this.socket.readyState === WebSocket.OPEN) this.socket.send(message);
  }

  /** The most frames without an answer. */
  get room() {
    return MAX_IN_FLIGHT;
  }

  /** A frame got its answer, or none will come. */
  onEnd() {}

  close() {
    this.socket.onclose = null;
    this.socket.close();
  }
}

/** Frames as messages of the widget, through the kernel: alone while none is under way, else several together. */
class Comm {
  /** @param {import("./page.js").Post} post */
  constructor(post) {
    this.post = post;
    /** Frames that wait for others to go with. @type {[any, ArrayBuffer][]} */ this.held = [];
    this.num_away = 0;
    this.compute_s = Infinity;
    this.isReady = post.send({ type: "begin" });
  }

  /** @param {any} header @param {ArrayBuffer} payload */
  send(header, payload) {
    const held_bytes = this.held.reduce((sum, [, one]) => sum + one.byteLength, 0);
    if (held_bytes + payload.byteLength > TOGETHER_BYTES) this.#go();
    this.held.push([header, payload]);
    if (!this.num_away || this.held.length === TOGETHER) this.#go();
  }

  /** See `Socket`. */
  get room() {
    return Math.min(MAX_IN_KERNEL, 2 + Math.floor(LIVE_S / this.compute_s));
  }

  /** See `Socket`. @param {number} [compute_s]  what the model took */
  onEnd(compute_s) {
    this.compute_s = compute_s ?? this.compute_s;
    this.num_away = Math.max(0, this.num_away - 1);
    if (!this.num_away) this.#go();
  }

  #go() {
    if (!this.held.length) return;
    const held = this.held;
    this.held = [];
    this.num_away += held.length;
    const headers = held.map(([header]) => header);
    this.post.send({ type: "frames", headers }, held.map(([, payload]) => payload));
  }

  close() {
    this.post.send({ type: "end" });
  }
}

class View {
  /** @param {HTMLElement} el @param {import("./page.js").Post} post */
  constructor(el, post) {
    this.post = post;
    /** @type {any} */ this.player = null;
    /** @type {Socket | Comm | null} */ this.road = null;
    /** @type {HTMLVideoElement | null} */ this.video = null;
    /** Encodes the frames of the page; null before the first. @type {Encoder | null} */ this.encoder = null;
    this.root = make("div", "nos-w nos-player");
    this.root.setAttribute("role", "group");
    this.root.setAttribute("aria-label", "Live frames through a model");
    this.title = make("span", "nos-title", "…");
    this.way = make("span", "nos-faint");
    this.camera = button("Camera", "Play the camera", () => this.play(() => openCamera({ fps: this.player.fps })));
    this.file = button("File…", "Play a video file", () => this.picker.click());
    this.picker = make("input", "nos-hidden");
    this.picker.type = "file";
    this.picker.accept = "video/*";
    this.picker.addEventListener("change", () => {
      const file = this.picker.files?.[0];
      if (file) this.play(() => openFile(file));
    });
    this.kernel = button("Play", "Play the frames of the notebook", () => this.play(null));
    this.stopper = button("Stop", "Stop playing", () => this.stop());
    this.snapshot = button("Snapshot", "Save the picture that is shown", () => this.#save());
    this.recorder = button("Record", "Record what is shown", () => this.#record());
    this.recorder.hidden = !window.MediaRecorder;
    /** What records now; null while nothing does. @type {MediaRecorder | null} */ this.recording = null;
    const bar = make("div", "nos-toolbar");
    bar.append(this.title, this.way, make("span", "nos-space"), this.camera, this.file, this.kernel, this.stopper, this.snapshot, this.recorder, this.picker);
    this.screen = make("canvas", "nos-screen");
    this.screen.setAttribute("role", "img");
    this.screen.setAttribute("aria-label", "What the model makes of the frames");
    this.screen.width = 640;
    this.screen.height = 360;
    this.place = make("div", "nos-result");
    this.place.hidden = true;
    this.stats = make("div", "nos-faint nos-stats");
    this.wrong = make("div", "nos-wrong-place");
    this.state = new StateLine(this.root);
    this.root.append(bar, this.screen, this.place, this.stats, this.wrong, this.state.line);
    el.append(this.root);
    this.#reset();
    this.#enable();
    this.saying = setInterval(() => this.#say(), SAY_MS);
  }

  #reset() {
    this.seq = 0;
    this.num_shown = 0;
    this.num_dropped = 0;
    /** When each frame without an answer was sent, and its picture once encoded. @type {Map<number, {began: number, blob: Blob | null}>} */ this.sent = new Map();
    /** @type {number[]} */ this.shown = [];
    /** @type {number[]} */ this.latencies = [];
  }

  #enable() {
    const isPlaying = this.isPlaying ?? false;
    const isKernel = this.player?.source === "kernel";
    this.camera.hidden = this.file.hidden = isKernel;
    this.kernel.hidden = !isKernel;
    for (const node of [this.camera, this.file, this.kernel]) node.disabled = isPlaying || !this.player;
    this.stopper.disabled = !isPlaying;
    this.snapshot.disabled = !this.num_shown;
    this.recorder.disabled = !isPlaying || !this.num_shown;
    this.root.dataset.playing = String(isPlaying);
  }

  /** @param {(() => Promise<HTMLVideoElement>) | null} open  the source in the page; null where the kernel has it */
  async play(open) {
    this.stop();
    this.again = () => this.play(open);
    this.wrong.replaceChildren();
    this.#reset();
    this.isPlaying = true;
    this.#enable();
    try {
      if (open) this.video = await open();
      const base = open ? await extension(this.player.address) : null;
      const lost = (/** @type {string} */ sentence) => this.#fail(sentence);
      this.road = base ? new Socket(base, this.player, (header, data) => this.#show(header, data), lost) : new Comm(this.post);
      this.root.dataset.road = base ? "server" : "kernel";
      this.way.textContent = base ? "through the Jupyter server" : "through the kernel";
      await this.road.isReady;
    } catch (error) {
      this.#fail(/** @type {Error} */ (error).message);
      return;
    }
    if (this.video) this.#pump(this.video);
  }

  /** Sends frames as they come, and none while too many have no answer. @param {HTMLVideoElement} video */
  #pump(video) {
    const interval = 1000 / this.player.fps;
    let due = performance.now();
    const step = () => {
      if (this.video !== video) return;
      const now = performance.now();
      if (now >= due - 4) {
        due = Math.max(due + interval, now - interval);
        this.#forget(now);
        if (this.sent.size >= (this.road?.room ?? 0)) this.num_dropped++;
        else this.#send(video);
      }
      if (this.video === video) setTimeout(step, Math.max(0, due - performance.now()));
    };
    step();
  }

  /** Gives up on frames without an answer, so that none holds up those that follow. @param {number} now */
  #forget(now) {
    for (const [seq, { began }] of this.sent) {
      if (now - began < GIVE_UP_MS) return;
      this.sent.delete(seq);
      this.road?.onEnd();
      this.num_dropped++;
    }
  }

  /** @param {HTMLVideoElement} video */
  async #send(video) {
    const seq = ++this.seq;
    /** @type {{began: number, blob: Blob | null}} */ const frame = { began: performance.now(), blob: null };
    this.sent.set(seq, frame);
    this.encoder ??= new Encoder();
    frame.blob = await this.encoder.encode(video, MAX_SIDE);
    const payload = await frame.blob.arrayBuffer();
    if (this.video === video) this.road?.send({ seq }, payload);
  }

  /** @param {any} header @param {DataView} data */
  #show(header, data) {
    const { seq, view, failure } = header;
    if (failure) this.wrong.replaceChildren(errorBox(failure.name, failure.sentence, null, failure.traceback));
    const sent = this.sent.get(seq);
    if (this.sent.delete(seq)) this.road?.onEnd(header.compute_s);
    if (header.dropped) this.num_dropped++;
    if (!view || !this.isPlaying) return;
    if (seq % ACK_EVERY === 0 && this.player.source === "kernel") this.post.send({ type: "ack", seq });
    const isPicture = view.kind === "pixels" || view.kind === "overlay";
    this.screen.hidden = !isPicture;
    this.place.hidden = isPicture;
    const bytes = new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
    if (view.kind === "pixels") drawPixels(this.screen, view.shape, bytes);
    else if (view.kind === "overlay") this.#overlay(view, bytes, sent?.blob);
    else showResult(this.place, view, data);
    const now = performance.now();
    this.num_shown++;
    this.shown.push(now);
    this.shown.splice(0, this.shown.length - KEPT);
    this.latencies.push(sent ? now - sent.began : header.server_s * 1e3);
    this.latencies.splice(0, this.latencies.length - KEPT);
    if (this.num_shown === 1) this.#enable();
  }

  /** Draws what was found over the frame that it was found in. @param {any} view @param {Uint8Array} masks @param {Blob | null | undefined} blob */
  async #overlay(view, masks, blob) {
    const picture = blob ? await createImageBitmap(blob) : null;
    drawOverlay(this.screen, view, masks, picture);
    picture?.close();
  }

  #say() {
    if (!this.num_shown) return;
    const span = this.shown[this.shown.length - 1] - this.shown[0];
    const fps = span > 0 ? ((this.shown.length - 1) * 1000) / span : 0;
    const sorted = [...this.latencies].sort((one, other) => one - other);
    const median = sorted[Math.floor(sorted.length / 2)];
    Object.assign(this.root.dataset, { fps: fps.toFixed(1), latencyMs: median.toFixed(1), shown: this.num_shown, dropped: this.num_dropped });
    this.stats.textContent = `${fps.toFixed(1)} fps · ${median.toFixed(0)} ms · ${this.num_shown} shown · ${this.num_dropped} dropped`;
  }

  #save() {
    this.#hand("png", this.screen.toDataURL("image/png"));
  }

  /** Gives a file to the user. @param {string} ending @param {string} url */
  #hand(ending, url) {
    const link = document.createElement("a");
    link.download = `${this.player.model.replaceAll("/", "-")}.${ending}`;
    link.href = url;
    link.click();
  }

  /** Starts to record what is shown, or ends it and gives the file. */
  #record() {
    if (this.recording) {
      this.recording.stop();
      return;
    }
    /** @type {Blob[]} */ const pieces = [];
    const options = MediaRecorder.isTypeSupported(RECORDED_TYPE) ? { mimeType: RECORDED_TYPE } : {};
    const recording = new MediaRecorder(this.screen.captureStream(RECORDED_FPS), options);
    recording.ondataavailable = ({ data }) => pieces.push(data);
    recording.onstop = () => {
      this.recording = null;
      this.#sayRecording();
      const url = URL.createObjectURL(new Blob(pieces, { type: recording.mimeType }));
      this.#hand(recording.mimeType.startsWith(RECORDED_TYPE) ? "webm" : "mp4", url);
      setTimeout(() => URL.revokeObjectURL(url), 60000);
    };
    recording.start();
    this.recording = recording;
    this.#sayRecording();
  }

  #sayRecording() {
    this.recorder.textContent = this.recording ? "End recording" : "Record";
    this.recorder.setAttribute("aria-pressed", String(this.recording !== null));
    this.recorder.setAttribute("aria-label", this.recording ? "End the recording and save it" : "Record what is shown");
  }

  /** @param {string} sentence */
  #fail(sentence) {
    this.stop();
    this.wrong.replaceChildren(errorBox("", sentence, () => this.again?.()));
  }

  /** Has the kernel keep what is shown, for the saved notebook. */
  async #keep() {
    if (!this.num_shown) return;
    this.#say();
    const text = this.stats.textContent;
    const buffers = this.screen.hidden ? [] : [await (await encode(this.screen, document.createElement("canvas"), "image/jpeg", 640)).arrayBuffer()];
    this.post.send({ type: "still", text }, buffers);
  }

  stop() {
    if (this.isPlaying) this.#keep();
    this.recording?.stop();
    closeVideo(this.video);
    this.video = null;
    this.road?.close();
    this.road = null;
    this.isPlaying = false;
    this.#enable();
  }

  /** @param {any} message @param {DataView[]} buffers */
  take(message, buffers) {
    if (message.type === "state") {
      this.state.show(message.name, message.sentence);
    } else if (message.type === "player") {
      this.player = message;
      this.title.textContent = message.model;
      this.#enable();
    } else if (message.type === "frame" && this.road instanceof Comm) this.#show(message, buffers[0]);
    else if (message.type === "ended") {
      this.stop();
      if (message.sentence) this.wrong.replaceChildren(errorBox(message.name, message.sentence, () => this.again?.()));
    }
  }

  close() {
    clearInterval(this.saying);
    this.stop();
    this.encoder?.close();
    release(this.place);
  }
}

export default live(View);
