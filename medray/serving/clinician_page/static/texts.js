// The question and the two answers: shown, edited, put back. Texts only ever become text nodes.

export class EditableText {
  constructor(box, name, changed) {
    this.box = box;
    this.shown = box.querySelector(".shown");
    this.mark = box.querySelector(".edited");
    this.field = document.createElement("textarea");
    this.field.maxLength = 20000;
    this.field.setAttribute("aria-label", `Edit ${name}`);
    this.button = document.createElement("button");
    this.button.type = "button";
    this.button.className = "edit";
    this.button.addEventListener("click", () => this.edit(this.field.hidden));
    this.field.addEventListener("input", () => {
      this.update();
      changed();
    });
    this.name = name;
    this.shown.after(this.field);
    (box.querySelector(".ticks") ?? box).append(this.button);
    this.put("", null);
  }

  put(original, edited) {
    this.original = original;
    this.field.value = edited ?? original;
    this.edit(false);
  }

  edit(open) {
    this.field.hidden = !open;
    this.shown.hidden = open;
    this.button.textContent = open ? "Done" : "Edit";
    this.button.setAttribute("aria-label", `${open ? "Done editing" : "Edit"} ${this.name}`);
    this.button.setAttribute("aria-expanded", String(open));
    if (open) {
      this.field.rows = Math.min(12, 2 + Math.ceil(this.field.value.length / 60));
      this.field.focus();
    } else if (!this.field.value.trim()) this.field.value = this.original; // an empty text is a slip
    this.update();
  }

  update() {
    this.shown.textContent = this.field.value;
    this.mark.hidden = this.changed() === null;
  }

  // What the text became, or null where it is as it was.
  changed() {
    const text = this.field.value.trim();
    return text === "" || text === this.original.trim() ? null : text;
  }
}
