// The server's API as the page uses it: the key, requests with it, and server-sent events.

const KEY = 'dsla-api-key';
let key = sessionStorage.getItem(KEY) ?? '';

export function hasKey() {
  return key !== '';
}

export function setKey(value) {
  key = value.trim();
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

// An answer that is not a success: `status` (0: no answer at all), the server's own message and code, and when to come
// back, in seconds.
export class ApiError extends Error {
  constructor(status, message, { code = '', retryAfter = 0 } = {}) {
    super(message);
    this.status = status;
    this.code = code;
    this.retryAfter = retryAfter;
  }
}

async function failure(response) {
  let message = `${response.status} ${response.statusText}`.trim();
  let code = '';
  try {
    const { error } = await response.json();
    message = error.message || message;
    code = error.code;
  } catch {
    // Not the API's own form, from a proxy say: the status line is what there is.
  }
  return new ApiError(response.status, message, { code, retryAfter: Number(response.headers.get('retry-after')) || 0 });
}

// `path` is relative to the page, which a proxy may have put under a path of its own. Throws ApiError, or AbortError
// when `signal` fires.
export async function call(path, { body, signal } = {}) {
  const headers = {};
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) headers['Content-Type'] = 'application/json';
  let response;
  try {
    response = await fetch(path, {
      method: body === undefined ? 'GET' : 'POST',
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
      cache: 'no-store',
    });
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    throw new ApiError(0, 'The server cannot be reached.');
  }
  if (!response.ok) throw await failure(response);
  return response;
}

// The JSON events of a stream, until [DONE]. An error event throws ApiError, and so does an end without [DONE]: then the
// server or a proxy went away.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = '';
  let data = [];
  try {
    for (;;) {
      const chunk = await reader.read().catch((error) => {
        if (error.name === 'AbortError') throw error;
        return { done: true };
      });
      if (chunk.done) throw new ApiError(0, 'The connection broke off.');
      buffer += chunk.value;
      const lines = buffer.split(/\r\n|\n|\r/);
      buffer = lines.pop();
      for (const line of lines) {
        if (line.startsWith('data:')) {
          data.push(line.slice(5).trimStart());
        } else if (line === '' && data.length) {
          const text = data.join('\n');
          data = [];
          if (text === '[DONE]') return;
          const event = JSON.parse(text);
          if (event.error) throw new ApiError(event.error.status ?? 500, event.error.message ?? 'The server reported an error.');
          yield event;
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
