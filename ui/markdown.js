// Enough of Markdown for a model's reply: paragraphs, headings, lists, quotes, fenced code, `code`, **bold**, *italics*.
// Everything reaches the page as text nodes, so whatever a model writes can only ever be text.

import { node } from './dom.js';

const INLINE = /(`+)([^`]|[^`][\s\S]*?[^`])\1(?!`)|\*\*([^\s*](?:[^*]*[^\s*])?)\*\*|\*([^\s*](?:[^*]*[^\s*])?)\*/;

function inline(parent, text) {
  let rest = text;
  for (let match = INLINE.exec(rest); match; match = INLINE.exec(rest)) {
    if (match.index > 0) parent.append(rest.slice(0, match.index));
    if (match[2] !== undefined) {
      parent.append(node('code', '', match[2]));
    } else {
      const styled = node(match[3] !== undefined ? 'strong' : 'em');
      inline(styled, match[3] ?? match[4]);
      parent.append(styled);
    }
    rest = rest.slice(match.index + match[0].length);
  }
  if (rest) parent.append(rest);
}

const LIST_ITEM = /^\s{0,3}(?:[-*+]|(\d{1,9})[.)])\s+(.*)$/;
const HEADING = /^(#{1,6})\s+(.*?)\s*#*$/;

// The blocks of a text: each is a list of lines. A fence holds its blank lines together.
function blocksOf(text) {
  const blocks = [];
  let lines = [];
  let fence = '';
  const flush = () => {
    if (lines.length) blocks.push(lines.join('\n'));
    lines = [];
  };
  for (const line of text.split('\n')) {
    const mark = /^\s{0,3}(```+|~~~+)/.exec(line);
    if (fence) {
      lines.push(line);
      if (mark && mark[1].startsWith(fence) && line.trim() === mark[1]) {
        fence = '';
        flush();
      }
    } else if (mark) {
      flush();
      fence = mark[1];
      lines.push(line);
    } else if (!line.trim()) {
      flush();
    } else if (HEADING.test(line)) {
      flush();
      lines.push(line);
      flush();
    } else {
      if (lines.length && LIST_ITEM.test(line) !== LIST_ITEM.test(lines[0]) && !/^\s{2,}/.test(line)) flush();
      lines.push(line);
    }
  }
  flush();
  return blocks;
}

function list(lines) {
  const number = LIST_ITEM.exec(lines[0])[1];
  const made = node(number === undefined ? 'ul' : 'ol');
  if (number !== undefined && number !== '1') made.start = Number(number);
  let item = null;
  for (const line of lines) {
    const match = LIST_ITEM.exec(line);
    if (match) {
      item = node('li');
      inline(item, match[2]);
      made.append(item);
    } else {
      item.append(' ');
      inline(item, line.trim());
    }
  }
  return made;
}

function block(source) {
  const lines = source.split('\n');
  const fence = /^\s{0,3}(```+|~~~+)/.exec(lines[0]);
  if (fence) {
    const closed = lines.length > 1 && lines[lines.length - 1].trim().startsWith(fence[1]);
    const pre = node('pre');
    pre.tabIndex = 0;  // scrolls sideways, so the keyboard must reach it
    pre.append(node('code', '', lines.slice(1, closed ? -1 : undefined).join('\n')));
    return pre;
  }
  const heading = HEADING.exec(lines[0]);
  if (heading) {
    const made = node(`h${Math.min(heading[1].length + 2, 6)}`);
    inline(made, heading[2]);
    return made;
  }
  if (LIST_ITEM.test(lines[0])) return list(lines);
  if (lines.every((line) => line.startsWith('>'))) {
    const quote = node('blockquote');
    inline(quote, lines.map((line) => line.replace(/^>\s?/, '')).join('\n'));
    return quote;
  }
  const paragraph = node('p');
  inline(paragraph, source);
  return paragraph;
}

// Keeps a node showing a text that grows: only blocks whose source changed are made again, so that a selection in an
// earlier one survives.
export class Markdown {
  constructor(root) {
    this.root = root;
    this.sources = [];
  }

  update(text) {
    const blocks = blocksOf(text);
    blocks.forEach((source, index) => {
      if (this.sources[index] === source) return;
      const made = block(source);
      const old = this.root.children[index];
      if (old) old.replaceWith(made);
      else this.root.append(made);
    });
    while (this.root.children.length > blocks.length) this.root.lastElementChild.remove();
    this.sources = blocks;
  }
}
