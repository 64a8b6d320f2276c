"""Check boxes of a page: what is chosen becomes commands, or a csv, to copy into a terminal.

One small script in the page does it, named by its hash in the page's policy, so that no other one
runs. It sends nothing: what it writes stands in boxes of text. Without scripts no box is shown.
"""

import base64
import hashlib
import html
from dataclasses import dataclass

PICK_STYLE = """
.pick, .picked { display: none; }
.picking .pick { display: flex; gap: .4rem; align-items: center; min-height: 24px;
  font-size: .8rem; cursor: pointer; }
.pick input { width: 18px; height: 18px; margin: 0; accent-color: var(--link); }
.pick input:focus-visible, .picked :focus-visible { outline: 2px solid var(--link);
  outline-offset: 2px; }
.picking .picked { display: block; position: sticky; bottom: 0; max-height: 45vh; overflow: auto;
  margin: 2rem 0 0; padding: .75rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .6rem .6rem 0 0; }
.picked h2 { margin: 0; padding: 0; border: 0; font-size: 1rem; }
.picked label { display: block; font-size: .85rem; color: var(--soft); }
.picked textarea { display: block; width: 100%; font: .8rem/1.4 ui-monospace, monospace;
  background: var(--paper); color: var(--ink); border: 1px solid var(--line); }
.picked button { margin: .2rem .4rem .5rem 0; font: inherit; font-size: .85rem;
  min-height: 28px; }
.picking .picked[hidden] { display: none; }
html:has(.picking) { scroll-padding-bottom: 46vh; }
@media print { .picking .picked, .picking .pick { display: none; } }
"""

PICK_SCRIPT = r"""
"use strict";
const all = [...document.querySelectorAll(".pick input")];
const panel = document.getElementById("picked"), count = document.getElementById("picked-count");
const texts = [...panel.querySelectorAll("textarea")];
const quoted = text => /^[\w@%+=:,./-]+$/.test(text) ? text
  : "'" + text.replaceAll("'", "'\\''") + "'";
const spans = texts => {
  const ids = [...new Set(texts)].map(BigInt).sort((a, b) => a < b ? -1 : a > b ? 1 : 0);
  const found = [];
  for (const id of ids) {
    const last = found.at(-1);
    if (last && last[1] + 1n === id) last[1] = id; else found.push([id, id]);
  }
  return found.map(([a, b]) => a === b ? `${a}` : b - a === 1n ? `${a},${b}` : `${a}-${b}`);
};
const write = {
  csv: (chosen, header) =>
    [header, ...new Set(chosen.map(one => one.line))].join("\n") + "\n",
  move: (chosen, command) =>
    `${command} --kind ${[...new Set(chosen.map(one => one.kind))].join(",")}`,
  forget: (chosen, command) => `${command} --ids=${spans(chosen.map(one => one.id))}`,
  relabel: (chosen, command) => [...new Set(chosen.map(one => one.label))].map(label => {
    const its = chosen.filter(one => one.label === label).map(one => one.id);
    return `${command} --ids=${spans(its)} --label=${label ? quoted(label) : "CLASS"}`;
  }).join("\n"),
};
const show = () => {
  const chosen = all.filter(box => box.checked).map(box => box.dataset);
  for (const text of texts)
    text.value = chosen.length ? write[text.name](chosen, text.dataset.begins) : "";
  count.textContent = `${chosen.length} ${chosen.length === 1 ? "box" : "boxes"} chosen`;
  panel.hidden = !chosen.length;
};
for (const box of all) box.addEventListener("change", show);
for (const text of texts) text.nextElementSibling.addEventListener("click", () => {
  text.select();
  document.execCommand("copy");
});
document.getElementById("picked-clear").addEventListener("click", () => {
  for (const box of all) box.checked = false;
  show();
  all[0].focus();
});
document.body.classList.add("picking");
show();
"""

PICK_POLICY = (
    "script-src 'sha256-"
    + base64.b64encode(hashlib.sha256(PICK_SCRIPT.encode()).digest()).decode()
    + "'"
)
"""Of a page with check boxes, beside the rest of its policy."""


@dataclass(frozen=True)
class Pick:
    """What is known of a picture that may be chosen.

    Attributes:
        name: for those who hear the page.
        id: of a stored row; empty for a file.
        label: that is suggested for it; empty for none.
        kind: of the finding.
        line: of the csv, without its end; of a file.
    """

    name: str
    id: str = ""
    label: str = ""
    kind: str = ""
    line: str = ""


@dataclass(frozen=True)
class Picking:
    """What becomes of chosen pictures: of rows two commands, of files one and a csv.

    Attributes:
        forget: a command that takes `--ids`; empty for files.
        relabel: another one, that also takes `--label`.
        move: a command that takes `--kind`, and reads the csv.
        header: the first line of the csv.
    """

    forget: str = ""
    relabel: str = ""
    move: str = ""
    header: str = ""


def pick_box(pick: Pick) -> str:
    """The check box of a picture, as HTML.

    Args:
        pick: what is known of it.
    """
    # a terminal obeys control characters that are pasted, also inside of quotes: CLASS stands then
    label = pick.label if pick.label.isprintable() else ""
    data = _data(id=pick.id, label=label, kind=pick.kind, line=pick.line)
    name = _escaped(f"choose {_printable(pick.name)}")
    return (
        f'<label class="pick"><input type="checkbox" aria-label="{name}"{data}>'
        '<span aria-hidden="true">choose</span></label>'
    )


def pick_panel(picking: Picking) -> str:
    """What shows the commands, as HTML, with the script.

    Args:
        picking: what becomes of chosen pictures.
    """
    texts = {
        "csv": ("Save this as chosen.csv", picking.header),
        "move": ("Then, to move them aside, in a terminal", picking.move),
        "relabel": ("To give them another label, in a terminal", picking.relabel),
        "forget": ("Or to forget them", picking.forget),
    }
    boxes = "".join(
        f'<div><label for="picked-{name}">{label}:</label><textarea id="picked-{name}" '
        f'name="{name}" rows="2" readonly{_data(begins=_printable(begins))}></textarea>'
        f'<button type="button" aria-label="Copy: {label.lower()}">Copy</button></div>'
        for name, (label, begins) in texts.items()
        if begins
    )
    return (
        '<section id="picked" class="picked" aria-labelledby="picked-title" hidden>'
        '<h2 id="picked-title">Chosen</h2><p id="picked-count" role="status"></p>'
        f'{boxes}<button type="button" id="picked-clear">Choose none</button></section>'
        f"<script>{PICK_SCRIPT}</script>"
    )


def _data(**values: str) -> str:
    return "".join(f' data-{name}="{_escaped(text)}"' for name, text in values.items())


def _escaped(text: str) -> str:
    return html.escape(text.encode("utf-8", "replace").decode())


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)
