// Service worker: what was loaded once is there without the server; the server's is preferred.
const CACHE = "tiepoints";
const FILES = [
  "./", "style.css", "app.js", "worker.js", "match.js", "graphs.json", "example/a.jpg",
  "example/b.jpg", "runtime/ort.wasm.min.mjs", "runtime/ort-wasm-simd-threaded.mjs",
  "runtime/ort-wasm-simd-threaded.wasm",
];

async function store() {
  const cache = await caches.open(CACHE);
  const graphs = await (await fetch("graphs.json")).json();
  await cache.addAll([...FILES, ...graphs.map((graph) => graph.path)]);
  await self.skipWaiting();
}

self.addEventListener("install", (event) => event.waitUntil(store()));
self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));
self.addEventListener("fetch", (event) => {
  if (event.request.method !== "GET") return;
  event.respondWith((async () => {
    const cache = await caches.open(CACHE);
    try {
      const response = await fetch(event.request);
      if (response.ok) await cache.put(event.request, response.clone());
      return response;
    } catch (error) {
      const stored = await cache.match(event.request);
      if (stored) return stored;
      throw error;
    }
  })());
});
