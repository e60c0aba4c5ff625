// @ts-check
// The page's camera: asked for on a click only, and said in a sentence when it cannot be had.

/** @type {Record<string, (device: string) => string>} */
const REFUSALS = {
  NotAllowedError: (device) => `the browser refused the ${device}: allow it for this page and try again`,
  NotFoundError: (device) => `this machine has no ${device}`,
  NotReadableError: (device) => `the ${device} is in use by another program`,
  OverconstrainedError: (device) => `the ${device} cannot do that size`,
};

/** Asks for a device of the page's machine. @param {string} device  its name in sentences @param {MediaStreamConstraints} wanted @returns {Promise<MediaStream>} */
export async function openDevice(device, wanted) {
  if (!window.isSecureContext || !navigator.mediaDevices)
    throw new Error(`browsers give the ${device} to pages of https or localhost only`);
  try {
    return await navigator.mediaDevices.getUserMedia(wanted);
  } catch (error) {
    throw new Error(REFUSALS[/** @type {Error} */ (error).name]?.(device) ?? `no ${device}: ${error}`);
  }
}

/** Opens the camera. @param {{width?: number, height?: number, fps?: number}} wanted @returns {Promise<HTMLVideoElement>} */
export async function openCamera({ width = 640, height = 480, fps = 30 } = {}) {
  const size = { width: { ideal: width }, height: { ideal: height }, frameRate: { ideal: fps } };
  const stream = await openDevice("camera", { video: size });
  const video = document.createElement("video");
  video.muted = true;
  video.playsInline = true;
  video.srcObject = stream;
  await video.play();
  return video;
}

/** Plays a video file again and again. @param {File} file @returns {Promise<HTMLVideoElement>} */
export async function openFile(file) {
  const video = document.createElement("video");
  video.muted = true;
  video.loop = true;
  video.playsInline = true;
  video.src = URL.createObjectURL(file);
  try {
    await video.play();
  } catch {
    URL.revokeObjectURL(video.src);
    throw new Error(`${file.name} (${file.type || "of no known type"}) is no video that this browser plays`);
  }
  return video;
}

/** Lets go of camera or file. @param {HTMLVideoElement | null} video */
export function closeVideo(video) {
  if (!video) return;
  video.pause();
  const stream = /** @type {MediaStream | null} */ (video.srcObject);
  stream?.getTracks().forEach((track) => track.stop());
  if (video.src) URL.revokeObjectURL(video.src);
  video.srcObject = null;
}

const QUALITY = 0.85;
const WORK = `onmessage = async ({ data: { picture, width, height, quality } }) => {
  const canvas = new OffscreenCanvas(width, height);
  canvas.getContext("2d").drawImage(picture, 0, 0, width, height);
  picture.close();
  postMessage(await canvas.convertToBlob({ type: "image/jpeg", quality }));
};`;

/** Encodes frames as JPEG in a thread of its own, in order: a page encodes only while it is idle. */
export class Encoder {
  constructor() {
    /** What takes the next picture. @type {((blob: Blob) => void)[]} */ this.waiting = [];
    const code = URL.createObjectURL(new Blob([WORK], { type: "text/javascript" }));
    this.worker = new Worker(code);
    URL.revokeObjectURL(code);
    this.worker.onmessage = ({ data }) => this.waiting.shift()?.(data);
  }

  /** @param {HTMLVideoElement} video @param {number} most  the longest side @returns {Promise<Blob>} */
  async encode(video, most) {
    const scale = Math.min(1, most / Math.max(video.videoWidth, video.videoHeight, 1));
    const [width, height] = [video.videoWidth, video.videoHeight].map((side) => Math.max(1, Math.round(side * scale)));
    // A frame is handed over as it is; a bitmap of it would be made in the page's own thread.
    const picture = window.VideoFrame ? new VideoFrame(video) : await createImageBitmap(video);
    return new Promise((resolve) => {
      this.waiting.push(resolve);
      this.worker.postMessage({ picture, width, height, quality: QUALITY }, [picture]);
    });
  }

  close() {
    this.worker.terminate();
  }
}

/** Encodes what a video or canvas shows. @param {HTMLVideoElement | HTMLCanvasElement} from @param {HTMLCanvasElement} canvas  scratch @param {string} type @param {number} most  the longest side @returns {Promise<Blob>} */
export async function encode(from, canvas, type = "image/jpeg", most = 4096) {
  const width = "videoWidth" in from ? from.videoWidth : from.width;
  const height = "videoHeight" in from ? from.videoHeight : from.height;
  const scale = Math.min(1, most / Math.max(width, height, 1));
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  canvas.getContext("2d")?.drawImage(from, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve, reject) => {
    canvas.toBlob((blob) => (blob ? resolve(blob) : reject(new Error("the picture could not be encoded"))), type, QUALITY);
  });
}
