// Text files that are dropped or chosen: a part of the message, with their names.

const MAX_BYTES = 512 * 1024;

const fenceFor = (text) => "`".repeat(1 + Math.max(2, ...(text.match(/`{3,}/g) ?? []).map((one) => one.length)));

// The file as a block of a message; an Error where it is no text.
export async function readFile(file) {
  if (file.size > MAX_BYTES) throw new Error(`${file.name} is larger than ${MAX_BYTES / 1024} KB.`);
  let text;
  try {
    text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
  } catch {
    throw new Error(`${file.name} is not a text in UTF-8.`);
  }
  if (text.includes("\0")) throw new Error(`${file.name} is not a text.`);
  const fence = fenceFor(text);
  return `${fence}${file.name.replace(/[\s`]+/g, "_")}\n${text.replaceAll("\r\n", "\n").trimEnd()}\n${fence}\n`;
}

// onText(text) for each file, onProblem(error) for one that cannot be read.
export function acceptFiles({ input, isWanted, onText, onProblem }) {
  const take = async (files) => {
    for (const file of files) {
      try {
        onText(await readFile(file));
      } catch (error) {
        onProblem(error);
      }
    }
  };
  input.addEventListener("change", () => {
    take([...input.files]);
    input.value = "";
  });
  const hasFiles = (event) => event.dataTransfer?.types.includes("Files") && isWanted();
  addEventListener("dragover", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    document.body.classList.add("dropping");
  });
  addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) document.body.classList.remove("dropping");
  });
  addEventListener("drop", (event) => {
    document.body.classList.remove("dropping");
    if (!hasFiles(event)) return;
    event.preventDefault();
    take([...event.dataTransfer.files]);
  });
}
