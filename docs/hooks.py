"""The pages of the site that repeat what README, results, cards, recipes and commands say: made while mkdocs builds.

mkdocs calls `on_config`, `on_files`, `on_page_markdown` and `on_page_content`. Formulas are written in LaTeX between
`$$` (in the docstrings of losses) and become MathML here, so that a page needs no script to show them.
"""

from __future__ import annotations

import html
import importlib
import inspect
import json
import re
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import typer.main
import yaml
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic import BaseModel

from kdbench.cards import KINDS, TermCard
from kdbench.cli import app
from kdbench.recipe.choices import Recipe
from kdbench.registry import Registry
from kdbench.signature import REQUIRED, parameters

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"

# Files outside docs/ that are pages of the site, and the names that they have there.
COPIED = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "THIRD_PARTY_NOTICES.md": "third-party-notices.md",
    "LICENSE": "LICENSE.txt",
    "CITATION.cff": "CITATION.cff",
    "results/README.md": "results/index.md",
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Puts the generated pages into the navigation."""
    found = {"METHODS": [page for page, _ in method_pages()], "RESULTS": [page for page, _ in result_pages()]}
    for section in config.nav or []:
        for title, entries in section.items():
            if isinstance(entries, list):
                section[title] = [page for entry in entries for page in found.get(str(entry), [entry])]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages, and the pictures and tables of results/ that they show."""
    for name, page in COPIED.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        # The first page has no neighbours to show beside it.
        head = "---\nhide: [navigation]\n---\n\n" if page == "index.md" else ""
        files.append(File.generated(config, page, content=head + text))
    for page, text in [
        ("methods/index.md", methods_index()),
        *method_pages(),
        *result_pages(),
        ("commands.md", commands()),
        ("fields.md", fields()),
        ("all-recipes.md", recipes()),
    ]:
        files.append(File.generated(config, page, content=text))
    for file in sorted(RESULTS.glob("*/*")):
        if file.suffix in (".png", ".csv", ".json", ".tex", ".html") and file.name != "recipe.json":
            # table.md becomes table.html, so the page of that name gets another.
            name = "interactive.html" if file.name == "table.html" else file.name
            target = f"results/{file.parent.name}/{name}"
            files.append(File.generated(config, target, abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links work both in the repository and here: the names that files outside docs/ have in the site."""
    source = {target: name for name, target in COPIED.items()}.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    if page.file.src_uri.startswith(("methods/", "results/")) and page.file.src_uri not in COPIED.values():
        return markdown
    markdown = markdown.replace("<!-- speed tables -->", speed_tables()).replace("<!-- losses -->", losses())
    folder = (ROOT / source).parent
    here = Path(page.file.src_uri).parent

    def moved(match: re.Match[str]) -> str:
        link, _, anchor = match[1].partition("#")
        if not link or "://" in link:
            return match[0]
        path = (folder / link).resolve()
        if not path.is_relative_to(ROOT):
            return match[0]
        name = path.relative_to(ROOT).as_posix()
        name = COPIED.get(name, name.removeprefix("docs/"))
        up = "../" * len(here.parts)
        return f"]({up}{name}{'#' + anchor if anchor else ''})"

    return re.sub(r"\]\(([^)\s]+)\)", moved, markdown)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """LaTeX, as arithmatex leaves it, becomes MathML."""

    def mathml(match: re.Match[str]) -> str:
        latex = html.unescape(match[2].strip())
        block = match[1] == "div"
        formula = convert(latex[2:-2], display="block" if block else "inline")
        return f'<div class="formula">{formula}</div>' if block else formula

    return re.sub(r'<(div|span) class="arithmatex">(.*?)</\1>', mathml, content, flags=re.S)


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table; texts are cells as they are."""
    head = list(head)
    lines = [head, ["---"] * len(head), *([str(cell).replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def code(value: object) -> str:
    return f"`{value}`" if value not in (None, "") else ""


def sentence(text: str) -> str:
    text = " ".join(text.split())
    return text[:1].upper() + text[1:]


# Methods


def by_file(kind: str) -> dict[str, list[str]]:
    """The keys of the shipped cards of a kind, by the file that holds them."""
    found: dict[str, list[str]] = {}
    for file in sorted((ROOT / "registry" / kind).glob("*.yaml")):
        found[file.stem] = list(yaml.safe_load(file.read_text(encoding="utf-8")))
    return found


def citation(cards: Registry, paper: str | None) -> str:
    if paper is None:
        return ""
    card = cards.card("papers", paper)
    where = f"https://arxiv.org/abs/{card.arxiv}" if card.arxiv else card.url
    title = f"[{card.title}]({where})" if where else card.title
    return f"{card.authors}: {title}. {card.venue} {card.year}."


def methods_index() -> str:
    cards = Registry()
    rows = []
    for file, keys in by_file("methods").items():
        for key in keys:
            card = cards.card("methods", key)
            paper = cards.card("papers", card.paper) if card.paper else None
            source = f"{paper.authors.split(',')[0].split()[-1]} et al., {paper.venue} {paper.year}" if paper else ""
            rows.append([f"[{card.title}]({file}.md#{key})", code(key), source])
    return (
        "# Methods\n\nMade from the cards in `registry/methods` and the docstrings in `kdbench/losses`. "
        "A recipe names a method by its key: `compare: {method: [kd, ab]}`.\n\n"
        + table(["method", "key", "paper"], rows)
    )


def method_pages() -> Iterator[tuple[str, str]]:
    cards = Registry()
    for file, keys in by_file("methods").items():
        parts = [method(cards, key) for key in keys]
        title = cards.card("methods", file).title if file in keys else file.replace("_", " ").capitalize()
        used = {term.loss for key in keys for term in terms(cards.card("methods", key))}
        # Losses of the same paper stand before the methods, those of others behind them.
        own = [key for key in by_file("losses").get(file, []) if key in used]
        first, last = ([loss(cards, key) for key in losses] for losses in (own, sorted(used.difference(own))))
        yield f"methods/{file}.md", "\n".join([f"# {title}\n", *first, *parts, *last])


def terms(card: Any) -> list[TermCard]:
    return [term for stage in card.stages.values() for term in stage.losses.values()]


def method(cards: Registry, key: str) -> str:
    """A section on one card."""
    card = cards.card("methods", key)
    lines = [f"## {card.title} {{ #{key} }}\n", f"Key: `{key}`", ""]
    if card.note:
        lines += [sentence(card.note) + ".", ""]
    if paper := citation(cards, card.paper):
        lines += [f"Paper: {paper}", ""]
    if card.follows:
        lines += [f"Follows: {' '.join(card.follows.split())}.", ""]
    if card.departs:
        lines += ["Where paper, official code and this card differ:", ""]
        lines += [f"- {sentence(text)}." for text in card.departs] + [""]
    lines += [table(["stage", "budget", "trains", "loss", "hook points", "weight"], stage_rows(card)), ""]
    if card.parameters:
        sets = {name: [said] if isinstance(said, str) else said for name, said in card.parameters.items()}
        rows = [[code(name), ", ".join(map(code, at)), code(default(cards, card, at[0]))] for name, at in sets.items()]
        lines += [f"Options, set by `method.NAME=VALUE`:\n\n{table(['name', 'sets', 'default'], rows)}"]
    return "\n".join(lines)


def stage_rows(card: Any) -> Iterator[list[str]]:
    for name, stage in card.stages.items():
        budget = stage.share or (f"{stage.extra_epochs:g} epochs more" if stage.extra_epochs else "the rest")
        for label, term in stage.losses.items():
            hooks = term.hook or (f"{term.student} → {term.teacher}" if term.student else "logits")
            schedules = term.weight_schedule if isinstance(term.weight_schedule, list) else [term.weight_schedule]
            times = "".join(f" × {schedule.name}" for schedule in schedules if schedule)
            connector = f", {code(term.connector.name)}" if term.connector else ""
            yield [
                name,
                budget,
                ", ".join(stage.trains),
                f"{label}: [`{term.loss}`](#loss-{term.loss})",
                code(hooks) + connector,
                f"{term.weight:g}{times}",
            ]
            name = budget = ""


def default(cards: Registry, card: Any, path: str) -> object:
    """What a parameter's path holds in a card, or what the loss or source behind it takes where the card is silent."""
    value: Any = card.model_dump()
    owner: tuple[str, str] | None = None
    for step in path.split("."):
        if not isinstance(value, dict):
            break
        if "loss" in value:
            owner = ("losses", value["loss"])
        elif "name" in value and step != "name":
            owner = ("sources", value["name"]) if ".source." in path else ("operations", value["name"])
        if step not in value:
            break
        value = value[step]
    else:
        return value["name"] if isinstance(value, dict) and "name" in value else value
    if owner is None:
        return None
    target = cards.card(*owner)
    name = path.rpartition(".")[2]
    fixed = getattr(target, "args", {})
    if name in fixed:
        return fixed[name]
    found = parameters(target.target).get(name)
    return found.default if found and found.default is not REQUIRED else None


def losses() -> str:
    """What holds for all losses, and what mkdocstrings reads as the docstrings of their files."""
    files = [file.stem for file in sorted((ROOT / "kdbench" / "losses").glob("*.py"))]
    options = "    options: {show_root_heading: false, show_root_toc_entry: false, heading_level: 3}\n"
    each = [f"::: kdbench.losses.{name}\n{options}" for name in files if name not in ("__init__", "checks")]
    return "\n".join([f"{inspect.getdoc(importlib.import_module('kdbench.losses'))}\n", *each])


def loss(cards: Registry, key: str) -> str:
    """A section on a loss card: its function's docstring, with the formula."""
    card = cards.card("losses", key)
    module, _, name = card.target.partition(":")
    function = getattr(importlib.import_module(module), name)
    summary = re.split(r"\n(?:Args|Returns|Raises):", inspect.getdoc(function) or "")[0]
    lines = [f"## Loss `{key}` {{ #loss-{key} }}\n", summary.strip(), ""]
    # What is no plain value, such as a mask, is the engine's to give.
    options = [option for option in cards.settable(card).values() if option.type is not None]
    if options:
        rows = [[code(o.name), code(o.annotation), code(repr(o.default))] for o in options]
        lines += [table(["option", "type", "default"], rows)]
    return "\n".join([*lines, f"`{module}.{name}`\n"])


# Results


def result_pages() -> Iterator[tuple[str, str]]:
    for file in sorted(RESULTS.glob("*/table.md")):
        folder = file.parent
        text = file.read_text(encoding="utf-8")
        pictures = [picture.name for picture in sorted(folder.glob("*.png"))]
        lines = [f"# {folder.name}\n", reading(folder.name), text, ""]
        lines += [f"![{name.removesuffix('.png').replace('_', ' ')}]({name})\n" for name in pictures]
        links = {
            "interactive.html": "the page with every run behind its numbers",
            "table.csv": "table.csv",
            "records.csv": "records.csv",
            "table.tex": "table.tex",
        }
        lines += ["Also: " + ", ".join(f"[{label}]({name})" for name, label in links.items()) + "."]
        yield f"results/{folder.name}/table.md", "\n".join(lines)


def reading(name: str) -> str:
    """What results/README.md says about a table, with links from the table's own folder."""
    sections = re.split(r"^## ", (RESULTS / "README.md").read_text(encoding="utf-8"), flags=re.M)
    found = [body for title, _, body in (section.partition("\n") for section in sections) if name in title.split()]
    return re.sub(r"\]\((?!http|#)", "](../", found[0]) if found else ""


def speed_tables() -> str:
    """Every row of every file in results/speed."""
    parts = []
    for file in sorted((RESULTS / "speed").glob("*.json")):
        found = json.loads(file.read_text(encoding="utf-8"))
        machine = found["machine"]
        for result in found["results"]:
            rows = []
            for row in result["rows"]:
                rounds = row["images_per_second"]
                numbers = [row["median"], min(rounds), max(rounds)]
                allowed = f"{row['ceiling']:.0f}" if row.get("ceiling") else ""
                peak = f"{100 * row['share_of_peak']:.0f} %" if row.get("share_of_peak") else ""
                rows.append([row["name"], *(f"{n:.1f}" for n in numbers), f"{row['times_first']:.2f}", peak, allowed])
            head = ["", "images/s", "lowest", "highest", "times torchdistill", "of the peak", "arithmetic allows"]
            where = f"{machine['device_name']}, {machine['threads']} threads, torch {machine['torch']}"
            title = f"**{result['title']}**, batches of {result['batch']}; {where}; median of {len(rounds)} rounds:"
            parts += [title, "", table(head, rows), ""]
    return "\n".join(parts)


# Commands, fields, recipes


def commands() -> str:
    """One section for each command, from the parser itself."""
    root: Any = typer.main.get_command(app)
    parts = ["# Commands\n\nThe same texts as `kdbench COMMAND --help`.\n"]
    for name, command in root.commands.items():
        if command.hidden:
            continue
        parts += [command_section(f"kdbench {name}", command)]
        for inner, below in getattr(command, "commands", {}).items():
            parts += [command_section(f"kdbench {name} {inner}", below)]
    return "\n".join(parts)


def command_section(name: str, command: Any) -> str:
    context = command.context_class(command, info_name=name)
    usage = " ".join([name, *command.collect_usage_pieces(context)])
    about = html.escape(inspect.cleandoc(command.help or ""), quote=False)
    lines = [f"## {name}\n", about, "", f"```text\n{usage}\n```\n"]
    rows = []
    for parameter in command.params:
        if parameter.name != "help" and (record := parameter.get_help_record(context)):
            meaning = html.escape(record[1].replace("[", "(").replace("]", ")"), quote=False)
            rows.append([code(record[0]), sentence(meaning)])
    if rows:
        lines += [table(["argument or option", ""], rows)]
    if command.epilog:
        # In a terminal, rich takes [word] for markup unless it is escaped.
        text = command.epilog.removeprefix("Examples:").replace("\\[", "[")
        examples = [part.strip() for part in text.split("·")]
        lines += ["```text", *(" ".join(example.split()) for example in examples), "```\n"]
    return "\n".join(lines)


def fields() -> str:
    """What recipes and cards may say, from the models that check them."""
    parts = [
        "# Fields\n\nEvery key that a recipe or a card may have. Unknown keys are errors. "
        "`kdbench schema` writes the same for editors.\n"
    ]
    shown: set[type[BaseModel]] = set()
    first: dict[str, type[BaseModel]] = {"Recipe": Recipe, **{f"Card: {kind}": model for kind, model in KINDS.items()}}
    for title, model in first.items():
        parts.append(field_section(title, model, shown))
    waiting = sorted((model for model in nested(shown) if model not in shown), key=lambda model: model.__name__)
    while waiting:
        for model in waiting:
            parts.append(field_section(model.__name__, model, shown))
        waiting = sorted((model for model in nested(shown) if model not in shown), key=lambda model: model.__name__)
    return "\n".join(parts)


def nested(models: Iterable[type[BaseModel]]) -> set[type[BaseModel]]:
    return {inner for model in models for field in model.model_fields.values() for inner in models_in(field.annotation)}


def models_in(annotation: Any) -> set[type[BaseModel]]:
    """The models inside an annotation that have fields to show."""
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return {annotation} if len(annotation.model_fields) > 1 else set()
    return {model for part in typing.get_args(annotation) for model in models_in(part)}


def field_section(title: str, model: type[BaseModel], shown: set[type[BaseModel]]) -> str:
    shown.add(model)
    rows = []
    for name, field in model.model_fields.items():
        value = "required" if field.is_required() else code(plain(field.get_default(call_default_factory=True)))
        rows.append([code(name), in_words(field.annotation), value, sentence(field.description or "")])
    about = inspect.getdoc(model) if model.__doc__ and model.__doc__ != BaseModel.__doc__ else ""
    return f"## {title}\n\n{about or ''}\n\n" + table(["key", "type", "default", "meaning"], rows)


def plain(value: object) -> object:
    return value.model_dump(exclude_defaults=True) or "{}" if isinstance(value, BaseModel) else value


def in_words(annotation: Any) -> str:
    """An annotation as a reader of YAML would say it."""
    if annotation is type(None):
        return "nothing"
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return in_words(inner[0])
    if origin is typing.Literal:
        return ", ".join(code(value) for value in inner)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(in_words(part) for part in inner if part is not type(None))
    if origin is list:
        return f"list of {in_words(inner[0])}"
    if origin is dict:
        return f"mapping to {in_words(inner[1])}"
    words = {str: "text", int: "whole number", float: "number", bool: "true or false", Any: "anything"}
    if annotation in words:
        return words[annotation]
    name = getattr(annotation, "__name__", str(annotation))
    if name == "Named":
        return "name, with options"
    return f"[{name}](#{name.lower()})" if models_in(annotation) else name


def recipes() -> str:
    """The shipped recipes by what their first comment lines say."""
    rows = []
    for file in sorted((ROOT / "recipes").glob("*.yaml")):
        about, _, time = [line.lstrip("# ") for line in file.read_text(encoding="utf-8").splitlines()[:3]]
        rows.append([code(file.stem), about.replace("->", "→"), time])
    return (
        "# All recipes\n\nThe recipes that come with kdbench: `kdbench run NAME`, `kdbench show recipes NAME`, "
        "`kdbench cp NAME`.\n\n" + table(["recipe", "what it shows", "time"], rows)
    )
