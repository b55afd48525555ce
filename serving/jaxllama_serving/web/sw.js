// Keeps the page's own files, so that it opens, with its chats, when the server is away. The API is never touched.

const CACHE = "jaxllama-page";
const FILES = ["./", "chat.css", "chat.js", "api.js", "chats.js", "markdown.js", "settings.js", "tokens.js", "tree.js", "turns.js"];

self.addEventListener("install", (event) => {
  self.skipWaiting();
  event.waitUntil(caches.open(CACHE).then((cache) => cache.addAll(FILES)));
});
self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));

// The server's file whenever there is one: a kept one is for when it cannot be reached.
self.addEventListener("fetch", (event) => {
  const url = new URL(event.request.url);
  const isOurs = FILES.some((file) => new URL(file, self.registration.scope).pathname === url.pathname);
  if (event.request.method !== "GET" || url.origin !== self.location.origin || !isOurs) return;
  event.respondWith(
    fetch(event.request)
      .then(async (response) => {
        if (response.ok) await (await caches.open(CACHE)).put(event.request, response.clone());
        return response;
      })
      .catch(async () => (await caches.match(event.request)) ?? Response.error()),
  );
});
