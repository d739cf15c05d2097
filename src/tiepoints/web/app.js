// The page: input of two images, options, drawing and download of the matches.

const element = (id) => document.getElementById(id);
const drops = [...document.querySelectorAll(".drop")];
const images = [null, null]; // {name, bitmap}
let result = null;
let latest = 0;

const worker = new Worker("worker.js", { type: "module" });
const waiting = new Map(); // id -> callbacks
worker.onmessage = ({ data }) => {
  const { resolve, reject } = waiting.get(data.id);
  waiting.delete(data.id);
  if (data.error === undefined) resolve(data.result);
  else reject(new Error(data.error));
};
worker.onerror = (event) => fail(new Error(event.message || "the worker could not be started"));

function compute(message) {
  return new Promise((resolve, reject) => {
    const id = ++latest;
    waiting.set(id, { resolve, reject });
    worker.postMessage({ ...message, id });
  });
}

function show(state, text) {
  document.body.dataset.state = state;
  element("status").textContent = text;
  element("run").disabled = state === "running" || state === "loading" || images.includes(null);
  element("example").disabled = state === "running" || state === "loading";
  element("download").disabled = result === null || state === "running";
}

function fail(error) {
  show("error", error.message);
}

async function setImage(index, blob, name) {
  result = null;
  try {
    const options = { premultiplyAlpha: "none", colorSpaceConversion: "none" };
    images[index] = { name, bitmap: await createImageBitmap(blob, options) };
  } catch {
    images[index] = null;
    drops[index].querySelector("output").textContent = "";
    throw new Error(`${name} is not an image that this browser can read; choose another file`);
  }
  const { width, height } = images[index].bitmap;
  drops[index].querySelector("output").textContent = `${name}, ${width} x ${height}`;
  show("ready", images.includes(null) ? "Choose the other photograph" : "Ready");
}

async function match() {
  show("running", "Computing");
  const count = Number(element("count").value);
  const graph = element("graph").value;
  const found = await compute({ url: graph, bitmaps: images.map((i) => i.bitmap), count });
  result = {
    images: images.map(({ name, bitmap: { width, height } }) => ({ name, width, height })),
    network: element("graph").selectedOptions[0].textContent,
    keypoints: found.keypoints.map((xy) => xy.length),
    fundamental_matrix: found.matrix,
    matches: found.matches.map((m) => ({
      a: found.keypoints[0][m.a],
      b: found.keypoints[1][m.b],
      similarity: m.similarity,
      inlier: m.inlier,
    })),
    milliseconds: found.milliseconds,
  };
  draw(found);
  const inliers = result.matches.filter((m) => m.inlier).length;
  showTimes(found.milliseconds);
  const text = `${result.keypoints.join(" and ")} keypoints, ${result.matches.length} matches, `
    + (found.matrix ? `${inliers} inliers` : "no common geometry");
  element("canvas").setAttribute("aria-label", text);
  show("done", text);
}

function showTimes(times) {
  const rows = Object.entries(times).map(([name, time]) => {
    const row = document.createElement("tr");
    row.append(document.createElement("th"), document.createElement("td"));
    row.children[0].scope = "row";
    row.children[0].textContent = name;
    row.children[1].textContent = time.toFixed(0);
    return row;
  });
  element("times").tBodies[0].replaceChildren(...rows);
  element("times").hidden = false;
}

// Both images next to each other, on narrow screens below each other, with keypoints and inliers.
function draw(found) {
  const canvas = element("canvas");
  const bitmaps = images.map((image) => image.bitmap);
  const below = window.innerWidth < window.innerHeight;
  const width = Math.min(1600, 2 * canvas.clientWidth || 1600);
  const sizes = bitmaps.map((b) => [b.width, b.height]);
  const total = below
    ? Math.max(...sizes.map(([w]) => w)) : sizes[0][0] + sizes[1][0];
  const scale = width / total;
  const offsets = [[0, 0], below ? [0, sizes[0][1] * scale] : [sizes[0][0] * scale, 0]];
  canvas.width = width;
  canvas.height = below
    ? (sizes[0][1] + sizes[1][1]) * scale : Math.max(sizes[0][1], sizes[1][1]) * scale;
  const context = canvas.getContext("2d");
  bitmaps.forEach((bitmap, i) =>
    context.drawImage(bitmap, ...offsets[i], bitmap.width * scale, bitmap.height * scale));
  // the center of the first pixel is (0, 0)
  const place = (i, xy) => xy.map((value, k) => (value + 0.5) * scale + offsets[i][k]);
  if (element("show-keypoints").checked) {
    context.fillStyle = "rgba(255, 220, 0, 0.8)";
    found.keypoints.forEach((points, i) => points.forEach((xy) => {
      const [x, y] = place(i, xy);
      context.fillRect(x - 1, y - 1, 2, 2);
    }));
  }
  context.lineWidth = 1;
  for (const { a, b, inlier } of found.matches) {
    if (!inlier) continue;
    const [start, end] = [place(0, found.keypoints[0][a]), place(1, found.keypoints[1][b])];
    context.strokeStyle = `hsl(${(start[0] * 137.5) % 360} 90% 55% / 0.7)`;
    context.beginPath();
    context.moveTo(...start);
    context.lineTo(...end);
    context.stroke();
  }
}

function download() {
  const link = document.createElement("a");
  const content = new Blob([JSON.stringify(result, null, 1)], { type: "application/json" });
  link.href = URL.createObjectURL(content);
  link.download = "matches.json";
  link.click();
  URL.revokeObjectURL(link.href);
}

async function fetched(path) {
  const response = await fetch(path);
  if (!response.ok) throw new Error(`${path}: ${response.status} ${response.statusText}`);
  return response;
}

async function example() {
  for (const [index, name] of ["a.jpg", "b.jpg"].entries()) {
    await setImage(index, await (await fetched(`example/${name}`)).blob(), name);
  }
  await match();
}

async function start() {
  for (const { name, path } of await (await fetched("graphs.json")).json()) {
    element("graph").add(new Option(name, path));
  }
  if (!element("graph").options.length) throw new Error("the server has no networks");
  show("ready", "Choose two photographs");
  navigator.serviceWorker?.register("offline.js");
}

drops.forEach((drop, index) => {
  const input = drop.querySelector("input");
  const use = (file) => file && setImage(index, file, file.name).catch(fail);
  input.addEventListener("change", () => use(input.files[0]));
  drop.addEventListener("dragover", (event) => {
    event.preventDefault();
    drop.classList.add("over");
  });
  drop.addEventListener("dragleave", () => drop.classList.remove("over"));
  drop.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    use(event.dataTransfer.files[0]);
  });
});
element("count").addEventListener("input", () => {
  element("count-shown").textContent = element("count").value;
});
element("form").addEventListener("submit", (event) => {
  event.preventDefault();
  match().catch(fail);
});
element("example").addEventListener("click", () => example().catch(fail));
element("download").addEventListener("click", download);
start().catch(fail);
