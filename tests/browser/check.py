"""Opens pages that `bkpack report` writes in headless Chromium and checks what only a browser can tell.

    python tests/browser/check.py BKPACK [--screenshots FOLDER]

BKPACK is the command. Needs the packages playwright, numpy and safetensors, and Chromium on the PATH.
"""

import argparse
import json
import os
import pathlib
import re
import shutil
import subprocess
import tempfile

import numpy
from playwright.sync_api import sync_playwright
from safetensors.numpy import save_file

ROOT = pathlib.Path(__file__).resolve().parents[2]
HOSTILE = "</script></title></style></table><script>window.broken=1</script><img src=x onerror='window.broken=1'>\" '&amp;"

# The least contrast of text and its ground that WCAG 2 asks for at level AA.
CONTRAST = 4.5

# Text whose contrast is too low, as [text, contrast]. The ground is that of the nearest ancestor that has one.
LOW_CONTRAST = """least => {
    const parse = text => text.match(/[\\d.]+/g).map(Number);
    const light = ([r, g, b]) => {
        const [x, y, z] = [r, g, b].map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * x + 0.7152 * y + 0.0722 * z;
    };
    const found = [];
    for (const element of document.querySelectorAll("body *:not(svg *):not(script)")) {
        const own = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
        if (!own || !element.checkVisibility()) continue;
        let ground = element;
        const opaque = e => (parse(getComputedStyle(e).backgroundColor)[3] ?? 1) === 1;
        while (ground !== document.documentElement && !opaque(ground)) ground = ground.parentElement;
        const [a, b] = [getComputedStyle(element).color, getComputedStyle(ground).backgroundColor].map(parse).map(light);
        const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        if (contrast < least) found.push([element.textContent.trim().slice(0, 40), contrast]);
    }
    return found;
}"""

# What a column holds: the values that its cells are sorted by.
COLUMN = "(table, column) => [...table.tBodies[0].rows].map(row => row.cells[column].dataset.value ?? row.cells[column].textContent)"

TURNED = {"ascending": "descending", "descending": "ascending"}


def pages(bkpack, folder):
    """The page of a real model with its quality and results, and one in which every text from a file is hostile."""

    def run(*arguments):
        done = subprocess.run([bkpack, *map(str, arguments)], check=True, stdout=subprocess.PIPE, cwd=ROOT)
        return done.stdout

    packed = folder / "llama.bkpack"
    run("convert", "fixtures/llama", "-o", packed, "--bits", "4", "--tensor", "v_proj=int6:g64", "-q")
    measured = run(
        "eval", packed, "--baseline", "fixtures/llama", "--text", "fixtures/wikitext2.test.txt", "--ctx", "128",
        "--limit-tokens", "2048", "--by-component", "--component-windows", "2", "--json", "-q",
    )  # fmt: skip
    (folder / "eval.json").write_bytes(measured)
    whole = folder / "report.html"
    run("report", packed, "docs/results/quantization", "docs/results/efficiency", "--eval", folder / "eval.json", "-q", "-o", whole)

    weights = {f"{HOSTILE}.{index}.weight": numpy.full((64, 64), 0.1, numpy.float32) for index in range(4)}
    save_file(weights, folder / "hostile.safetensors")
    (folder / "config.json").write_text(json.dumps({"architectures": [HOSTILE], "hidden_act": HOSTILE, HOSTILE: HOSTILE}))
    run("convert", folder / "hostile.safetensors", "--config", folder / "config.json", "-o", folder / "hostile.bkpack", "-q")
    results = folder / "results"
    results.mkdir()
    for index, bits in enumerate([32, 8]):
        result = {"bit_width": bits, "perplexity": 20 + index, "model": HOSTILE, "encoding": HOSTILE, "simulated": True}
        (results / f"{index}.json").write_text(json.dumps(result))
    hostile = folder / "hostile.html"
    run("report", folder / "hostile.bkpack", results, "-q", "-o", hostile, "--title", HOSTILE)
    return whole, hostile


class Opened:
    """A page in a tab of its own, and everything that went wrong in it."""

    def __init__(self, browser, path, **options):
        self.wrong = []
        self.tab = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options}).new_page()
        self.tab.on("console", lambda message: self.wrong.append(f"console: {message.text}"))
        self.tab.on("pageerror", lambda error: self.wrong.append(f"error: {error}"))
        self.tab.on("dialog", lambda dialog: self.wrong.append(f"dialog: {dialog.message}"))
        url = path.as_uri()
        ours = lambda request: request.url == url or request.url.startswith("data:")
        self.tab.on("request", lambda request: ours(request) or self.wrong.append(f"request: {request.url}"))
        self.tab.goto(url)
        self.tab.evaluate("document.fonts.ready.then(() => 0)")

    def close(self):
        assert not self.wrong, self.wrong
        self.tab.context.close()


def natural(text):
    """The order of words with numbers in them: digits count by value, letters without case."""
    return [(0, int(run), "") if run.isdigit() else (1, 0, run.lower()) for run in re.split(r"(\d+)", text) if run]


def check_sorting(tab):
    """Sorts each table by each column, both ways, with mouse and keyboard in turn; gives the number of tables."""
    tables = tab.locator("table.sortable")
    reordered = 0
    for table in tables.all():
        # A table that is folded away is sorted once it is seen.
        table.evaluate("table => { const details = table.closest('details'); if (details) details.open = true; }")
        for column, head in enumerate(table.locator("thead th").all()):
            values = lambda: table.evaluate(f"table => ({COLUMN})(table, {column})")
            number = "number" in (head.get_attribute("class") or "")
            before, first = values(), TURNED.get(head.get_attribute("aria-sort"))
            first = first or ("descending" if number else "ascending")
            for direction in (first, TURNED[first]):
                button = head.get_by_role("button")
                if column % 2:
                    button.focus()
                    tab.keyboard.press("Enter")
                else:
                    button.click()
                assert head.get_attribute("aria-sort") == direction, (column, direction)
                assert table.locator("thead th[aria-sort]").count() == 1
                after = values()
                assert sorted(after) == sorted(before), "rows are lost or doubled"
                full = [value for value in after if value != ""]
                assert after == full + [""] * (len(after) - len(full)), "empty cells come last"
                if number or table.get_attribute("id") == "tensor-table" and column == 0 and "<" not in full[0]:
                    keys = [float(value) if number else natural(value) for value in full]
                    assert keys == sorted(keys, reverse=direction == "descending"), (column, direction)
                reordered += after != before
    assert reordered >= 4, f"sorting reordered only {reordered} times"
    return tables.count()


def check_filter(tab):
    table, field = tab.locator("#tensor-table"), tab.locator("#tensor-table-filter")
    rows = table.locator("tbody tr")
    names = rows.locator("td:first-child").all_inner_texts()
    wanted = [name for name in names if "mlp" in name and "layers.3" in name]
    field.fill("MLP layers.3")
    visible = [row.locator("td").first.inner_text() for row in rows.all() if row.is_visible()]
    assert sorted(visible) == sorted(wanted) and 0 < len(wanted) < len(names), visible
    assert tab.locator(".filter output").first.inner_text() == f"{len(wanted)} of {len(names)} tensors"
    field.fill("no tensor has this")
    assert not any(row.is_visible() for row in rows.all())
    field.fill("")
    assert all(row.is_visible() for row in rows.all())


def check_looks(browser, path, screenshots):
    grounds = {}
    for scheme in ("light", "dark"):
        opened = Opened(browser, path, color_scheme=scheme)
        low = opened.tab.evaluate(LOW_CONTRAST, CONTRAST)
        assert not low, f"{scheme}: {low}"
        grounds[scheme] = opened.tab.evaluate("getComputedStyle(document.body).backgroundColor")
        papers = opened.tab.locator(".paper").evaluate_all("all => all.map(e => getComputedStyle(e).backgroundColor)")
        assert papers and set(papers) == {"rgb(255, 255, 255)"}, "figures stand on white"
        picture(opened.tab, screenshots, f"{path.stem}-{scheme}")
        opened.close()
    assert grounds["light"] != grounds["dark"], grounds
    for width in (400, 320, 768):
        opened = Opened(browser, path, viewport={"width": width, "height": 800})
        overflow = opened.tab.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert overflow <= 0, f"at {width} pixels the page is {overflow} pixels too wide"
        picture(opened.tab, screenshots, f"{path.stem}-{width}")
        opened.close()
    printed = Opened(browser, path, viewport={"width": 794, "height": 1123})
    printed.tab.emulate_media(media="print")
    assert not printed.tab.locator(".filter").first.is_visible()
    heights = printed.tab.locator(".scroll").evaluate_all("all => all.map(e => e.scrollHeight - e.clientHeight)")
    assert max(heights) <= 1, "a table is cut on paper"
    if screenshots:
        printed.tab.pdf(path=screenshots / f"{path.stem}.pdf", format="A4", print_background=True)
    printed.close()


def check_without_script(browser, path, rows):
    opened = Opened(browser, path, java_script_enabled=False)
    assert opened.tab.locator("#tensor-table tbody tr").count() == rows
    assert opened.tab.locator("svg").count() == 3 and not opened.tab.locator(".filter").first.is_visible()
    opened.close()


def picture(tab, folder, name):
    if folder:
        tab.screenshot(path=folder / f"{name}.png", full_page=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bkpack", type=pathlib.Path)
    parser.add_argument("--screenshots", type=pathlib.Path)
    arguments = parser.parse_args()
    chromium = shutil.which("chromium") or parser.error("chromium is not on the PATH")
    if arguments.screenshots:
        arguments.screenshots.mkdir(parents=True, exist_ok=True)
    # Chromium's sandbox does not run as root.
    options = ["--no-sandbox"] if os.geteuid() == 0 else []
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        whole, hostile = pages(arguments.bkpack.resolve(), pathlib.Path(folder))
        browser = playwright.chromium.launch(executable_path=chromium, args=options)
        opened = Opened(browser, whole)
        rows = opened.tab.locator("#tensor-table tbody tr").count()
        tables = check_sorting(opened.tab)
        check_filter(opened.tab)
        opened.close()
        check_looks(browser, whole, arguments.screenshots)
        check_without_script(browser, whole, rows)

        opened = Opened(browser, hostile)
        assert opened.tab.evaluate("window.broken") is None and opened.tab.locator("img").count() == 0
        assert opened.tab.title() == HOSTILE and opened.tab.locator("h1").inner_text() == HOSTILE
        check_sorting(opened.tab)
        opened.close()
        check_looks(browser, hostile, arguments.screenshots)
        browser.close()
    print(f"the page of {rows} tensors: {tables} tables are sorted and filtered; light, dark, narrow, printed, without script")


if __name__ == "__main__":
    main()
