// Requests to the page's own server. Every failure is an ApiError with a sentence to show.

export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status; // 0: no answer came
  }
}

export async function ask(path, body) {
  const request = body === undefined ? {} : { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  let response;
  try {
    response = await fetch(path, { credentials: "same-origin", ...request });
  } catch {
    throw new ApiError("The server does not answer. Nothing is lost on this page.", 0);
  }
  if (response.ok) return response;
  const answer = await response.json().catch(() => null);
  throw new ApiError(answer?.error?.message ?? `The server answers ${response.status}.`, response.status);
}

export const asJson = async (path, body) => (await ask(path, body)).json();

// 128 random bits. crypto.randomUUID is missing where a page comes over plain http.
export function newKey() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}
