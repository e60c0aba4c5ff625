// @ts-check
// The page's microphone, heard as 16 kHz mono: asked for on a click only, and said in a sentence when it cannot be had.

import { openDevice } from "./camera.js";

const RATE_HZ = 16000;
const MAX_SOUND_S = 600;
const EAR = `registerProcessor("nos-ear", class extends AudioWorkletProcessor {
  process([[heard]]) {
    if (heard) this.port.postMessage(heard.slice());
    return true;
  }
});`;

/** Begins to listen; returns what ends it and gives a WAV file. @param {(seconds: number) => void} told  hears how long it is already @returns {Promise<() => ArrayBuffer>} */
export async function openMicrophone(told) {
  const stream = await openDevice("microphone", { audio: { channelCount: 1 } });
  const context = new AudioContext({ sampleRate: RATE_HZ });
  const code = URL.createObjectURL(new Blob([EAR], { type: "text/javascript" }));
  await context.audioWorklet.addModule(code);
  URL.revokeObjectURL(code);
  const ear = new AudioWorkletNode(context, "nos-ear");
  /** @type {Float32Array[]} */ const pieces = [];
  let count = 0;
  ear.port.onmessage = ({ data }) => {
    if (count >= MAX_SOUND_S * RATE_HZ) return;
    pieces.push(data);
    count += data.length;
    told(count / RATE_HZ);
  };
  context.createMediaStreamSource(stream).connect(ear);
  ear.connect(context.destination);
  return () => {
    stream.getTracks().forEach((track) => track.stop());
    context.close();
    return encodeWav(pieces, count);
  };
}

/** 16-bit mono PCM in a WAV file. @param {Float32Array[]} pieces @param {number} count  of samples in all @returns {ArrayBuffer} */
export function encodeWav(pieces, count) {
  const file = new DataView(new ArrayBuffer(44 + 2 * count));
  const text = (/** @type {number} */ at, /** @type {string} */ word) => [...word].forEach((letter, by) => file.setUint8(at + by, letter.charCodeAt(0)));
  text(0, "RIFF");
  file.setUint32(4, 36 + 2 * count, true);
  text(8, "WAVEfmt ");
  file.setUint32(16, 16, true);
  file.setUint16(20, 1, true);
  file.setUint16(22, 1, true);
  file.setUint32(24, RATE_HZ, true);
  file.setUint32(28, 2 * RATE_HZ, true);
  file.setUint16(32, 2, true);
  file.setUint16(34, 16, true);
  text(36, "data");
  file.setUint32(40, 2 * count, true);
  let at = 44;
  for (const piece of pieces)
    for (const level of piece) {
      file.setInt16(at, Math.max(-1, Math.min(1, level)) * 0x7fff, true);
      at += 2;
    }
  return file.buffer;
}
