// The API as this page uses it: a request, and the events of its stream.

const KEY = "jaxllama.apiKey";

/** The key lives in this tab only; it is never written to disk. */
export const apiKey = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

/** What went wrong, in the words of the server's error envelope. */
export class ApiProblem extends Error {
  constructor(message, { status = 0, type = null, code = null, param = null, requestId = null, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { status, type, code, param, requestId, retryAfter });
  }
}

async function send(path, init = {}) {
  const headers = { ...init.headers };
  if (apiKey.get()) headers.Authorization = `Bearer ${apiKey.get()}`;
  let response;
  try {
    response = await fetch(path, { ...init, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiProblem("The server cannot be reached. Is it still running?");
  }
  if (response.ok) return response;
  const error = (await response.json().catch(() => null))?.error ?? {};
  throw new ApiProblem(error.message ?? `The server answered with status ${response.status}.`, {
    ...error,
    status: response.status,
    requestId: response.headers.get("X-Request-Id"),
    retryAfter: response.headers.get("Retry-After"),
  });
}

export async function listModels() {
  return (await (await send("v1/models")).json()).data;
}

/** Yields the chunks of a streamed chat completion. Throws ApiProblem, also for an error inside the stream. */
export async function* streamChat(body, signal) {
  const response = await send("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({
      ...body,
      stream: true,
      stream_options: { include_usage: true, continuous_usage_stats: true },
    }),
    signal,
  });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) {
      throw new ApiProblem(chunk.error.message, { ...chunk.error, requestId: response.headers.get("X-Request-Id") });
    }
    yield chunk;
  }
  throw new ApiProblem("The connection ended before the answer did.");
}

/** Yields the data of each server-sent event; comments and other fields are skipped. */
export async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      let result;
      try {
        result = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new ApiProblem("The connection broke off.");
      }
      if (result.done) return;
      const parts = (rest + result.value).replaceAll("\r\n", "\n").split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const lines = part.split("\n").filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
