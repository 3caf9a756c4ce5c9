// What every part of the page needs of the document.

export const $ = (id) => document.getElementById(id);

export function node(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// Writes only what changed, so that screen readers and layout are left alone.
export function write(target, text) {
  if (target.textContent !== text) target.textContent = text;
}

// To screen readers.
export function announce(text) {
  $('announce').textContent = text;
}

// The server's messages are clauses.
export function sentence(clause) {
  return `${clause.charAt(0).toUpperCase()}${clause.slice(1)}${/[.!?]$/.test(clause) ? '' : '.'}`;
}
