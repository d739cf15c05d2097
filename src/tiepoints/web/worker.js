// Extraction and matching, outside of the page's thread.
import * as ort from "./runtime/ort.wasm.min.mjs";
import { agreeingMatches, beyondChance, fundamental, mutualMatches } from "./match.js";

const MIN_NEIGHBORS = 2; // matches that must agree with each
const THRESHOLD = 2; // pixels
const MAX_SIZE = 1600; // larger images are reduced, as by `tiepoints match`

ort.env.wasm.wasmPaths = new URL("./runtime/", import.meta.url).href;
ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(8, navigator.hardwareConcurrency) : 1;

const sessions = new Map(); // URL of a graph -> promise of its session

function session(url) {
  if (!sessions.has(url)) {
    const created = ort.InferenceSession.create(url, { executionProviders: ["wasm"] });
    created.catch(() => sessions.delete(url));
    sessions.set(url, created);
  }
  return sessions.get(url);
}

// RGB in [0, 1] of a bitmap as a tensor (1,3,h,w), and the number of pixels per pixel of it.
function pixels(bitmap) {
  const factor = Math.min(1, MAX_SIZE / Math.max(bitmap.width, bitmap.height));
  const reduced = (length) => Math.max(1, Math.round(length * factor));
  const [width, height] = [reduced(bitmap.width), reduced(bitmap.height)];
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, width, height);
  const { data } = context.getImageData(0, 0, width, height);
  const planes = new Float32Array(3 * width * height);
  for (let i = 0, n = width * height; i < n; i++) {
    for (let c = 0; c < 3; c++) planes[c * n + i] = data[4 * i + c] / 255;
  }
  const ratio = [bitmap.width / width, bitmap.height / height];
  return { tensor: new ort.Tensor("float32", planes, [1, 3, height, width]), ratio };
}

async function extract(graph, bitmap, count) {
  const { tensor, ratio } = pixels(bitmap);
  const limit = new ort.Tensor("int64", BigInt64Array.of(BigInt(count)), [1]);
  const output = await graph.run({ image: tensor, max_keypoints: limit });
  const positions = output.keypoints.data;
  const xy = [];
  for (let i = 0; i < positions.length; i += 2) {
    xy.push([0, 1].map((k) => (positions[i + k] + 0.5) * ratio[k] - 0.5));
  }
  const factor = Math.sqrt(ratio[0] * ratio[1]);
  const scales = Array.from(output.scales.data, (scale) => scale * factor);
  return { xy, scales, descriptors: output.descriptors.data, dim: output.descriptors.dims[1] };
}

async function run({ url, bitmaps, count }) {
  const times = {};
  let started = performance.now();
  const lap = (name) => {
    const now = performance.now();
    times[name] = now - started;
    started = now;
  };
  const graph = await session(url);
  lap("load network");
  const features = [];
  for (const [index, bitmap] of bitmaps.entries()) {
    features.push(await extract(graph, bitmap, count));
    lap(`features of image ${index + 1}`);
  }
  const [a, b] = features;
  const nearest = mutualMatches(a.descriptors, b.descriptors, a.dim);
  const matches = agreeingMatches(nearest, a, b, MIN_NEIGHBORS);
  lap("matching");
  const points = (found) => found.map((m) => [...a.xy[m.a], ...b.xy[m.b]]);
  let { matrix, inliers } = fundamental(points(matches), THRESHOLD);
  // incorrect matches may agree with their neighbors, too, so chance is measured among all
  if (matrix && !beyondChance(points(nearest), matrix, THRESHOLD)) {
    [matrix, inliers] = [null, inliers.map(() => false)];
  }
  lap("geometry");
  return {
    keypoints: [a.xy, b.xy],
    matches: matches.map((m, i) => ({ ...m, inlier: inliers[i] })),
    matrix,
    milliseconds: times,
  };
}

self.onmessage = async ({ data }) => {
  try {
    self.postMessage({ id: data.id, result: await run(data) });
  } catch (error) {
    self.postMessage({ id: data.id, error: String(error?.message ?? error) });
  }
};
