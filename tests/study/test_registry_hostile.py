"""Registries and interfaces with slips or of bad will: one line that names file, entry and field;
nothing is written outside the cache.
"""

import json
import warnings

import layouts
import pytest
from server import Server

from vampsc import downloads, organs
from vampsc.downloads import DownloadError
from vampsc.organs import OrganError

STUDY = """
[[study]]
name = "mine"
organ = "skin"
{study}
"""
SOURCE = """
[[study.source]]
reader = "table"
files.counts = {{ name = "mine.tsv", urls = [] }}
{source}
"""
WHOLE = STUDY.format(study="") + SOURCE.format(source="")


def study(text):
    return STUDY.format(study=text) + SOURCE.format(source="")


def source(text, base=SOURCE):
    return STUDY.format(study="") + base.format(source=text)


def file(text):
    return STUDY.format(study="") + f'[[study.source]]\nreader = "table"\nfiles.counts = {text}\n'


def named(name):
    return WHOLE.replace('"mine"', json.dumps(name))


def kept_as(name):
    return file(f'{{ name = {json.dumps(name)}, urls = ["https://x.example/a.tsv"] }}')


SLIPS = {  # what stands in own.toml, and what is said of it
    "no TOML": ("name: mine\norgan: skin\n", "registry own.toml cannot be read: .*must be TOML"),
    "JSON": ('{"study": [{"name": "mine"}]}', "registry own.toml cannot be read: .*must be TOML"),
    "bytes": (b"\xff\xfe\x00", "registry own.toml cannot be read: .*must be TOML"),
    "control characters": ("a = '\x1b[31m'", "registry own.toml cannot be read: .*must be TOML"),
    "deep": ("a = " + "[" * 100_000, "registry own.toml cannot be read"),
    "study is text": (
        'study = "mine"',
        "own.toml: study = 'mine' must be a list of tables; begin each with",
    ),
    "study is a table": ('[study]\nname = "mine"', "own.toml: study = .* must be a list of tables"),
    "study is numbers": ("study = [1, 2]", "own.toml, study 1: 1 is no table of fields"),
    "studies": (
        '[[studies]]\nname = "mine"',
        "own.toml: 'studies' = .* is outside of a study; begin each with",
    ),
    "a field before all": (
        'organ = "skin"\n' + WHOLE,
        "own.toml: 'organ' = 'skin' is outside of a study",
    ),
    "unknown field": (
        study('titel = "x"'),
        "own.toml, study mine: no field is called 'titel', did you mean title",
    ),
    "unknown field with control characters": (
        study('"a\\u001b[2J" = "x"'),
        r"own.toml, study mine: no field is called 'a\?\[2J'",
    ),
    "no name": (
        '[[study]]\norgan = "skin"\nsource = []',
        "own.toml, study 1: the field 'name' is missing",
    ),
    "no organ": (
        '[[study]]\nname = "mine"\n' + SOURCE.format(source=""),
        "own.toml, study mine: the field 'organ' is missing",
    ),
    "no source": (STUDY.format(study=""), "own.toml, study mine: the field 'source' is missing"),
    "source is text": (
        STUDY.format(study='source = "here"'),
        "own.toml, study mine: source = 'here' is of another kind: list",
    ),
    "sources are text": (
        STUDY.format(study='source = ["here"]'),
        "own.toml, study mine, source 1: 'here' is no table of fields",
    ),
    "name is a number": (
        WHOLE.replace('"mine"', "7"),
        "own.toml, study 7: name = 7 is of another kind: str",
    ),
    "name is a list": (
        WHOLE.replace('"mine"', '["mine"]'),
        "own.toml, study .*mine.*: name = .* is of another kind: str",
    ),
    "organ is a list": (
        WHOLE.replace('"skin"', '["skin"]'),
        r"own.toml, study mine: organ = \['skin'\] is of another kind: str",
    ),
    "cells are text": (
        study('cells = "many"'),
        "own.toml, study mine: cells = 'many' is of another kind: int",
    ),
    "cells are true": (
        study("cells = true"),
        "own.toml, study mine: cells = True is of another kind: int",
    ),
    "cells below 0": (study("cells = -1"), "own.toml, study mine: cells = -1 is less than 0"),
    "in_paper is nan": (
        study("in_paper = nan"),
        "own.toml, study mine: in_paper = nan must be from 0 to 1",
    ),
    "a date": (
        study("title = 2020-01-01"),
        "own.toml, study mine: title = .* is of another kind: str",
    ),
    "gene space": (
        study('gene_space = "None"'),
        "own.toml, study mine: gene_space = 'None' must be 'none'",
    ),
    "two of a name": (WHOLE + WHOLE, "own.toml, study mine: the name stands for 2 studies"),
    "+ in a name": (
        named("a+b"),
        "own.toml, study a.b: name = 'a.b': . joins the names of studies",
    ),
    "unknown reader": (
        WHOLE.replace('"table"', '"tabel"'),
        "own.toml, study mine: no reader is called 'tabel', did you mean table",
    ),
    "reader is a list": (
        WHOLE.replace('"table"', '["table"]'),
        r"own.toml, study mine: reader = \['table'\] is of another kind: str",
    ),
    "unknown access": (
        source('access = "opne"'),
        "own.toml, study mine: no access is called 'opne', did you mean open",
    ),
    "embedded": (
        source('access = "embedded"'),
        "own.toml, study mine: no access is called 'embedded'",
    ),
    "files is text": (
        WHOLE.replace('files.counts = { name = "mine.tsv", urls = [] }', 'files = "mine.tsv"'),
        "study mine: files = 'mine.tsv' is of another kind: dict",
    ),
    "a file is text": (file('"mine.tsv"'), "own.toml, study mine: files.counts must be like"),
    "a file's name is a number": (
        file("{ name = 3 }"),
        "own.toml, study mine: files.counts: name = 3 is of another kind: str",
    ),
    "a file without name": (
        file('{ urls = ["https://x.example/a"] }'),
        "own.toml, study mine: files.counts must be like",
    ),
    "a file's other field": (
        file('{ name = "a", url = "https://x.example/a" }'),
        "files.counts: no field is called 'url', did you mean urls",
    ),
    "urls is text": (
        file('{ name = "a", urls = "https://x.example/a" }'),
        (
            "files.counts: urls = 'https://x.example/...' is of another kind: list|files.counts:"
            " urls = .* is of another kind: list"
        ),
    ),
    "urls are numbers": (
        file('{ name = "a", urls = [1] }'),
        "files.counts: urls holds 1, where text is due",
    ),
    "an address of a file": (
        file('{ name = "a", urls = ["file:///etc/hostname"] }'),
        "files.counts: urls: 'file:///etc/hostname' does not begin with https",
    ),
    "a short checksum": (
        file('{ name = "a", sha256 = "abc" }'),
        "files.counts: sha256 = 'abc' must be 64 digits",
    ),
    "no counts": (
        WHOLE.replace("files.counts", "files.labels"),
        "own.toml, study mine: files: the field 'counts' is missing",
    ),
    "drop is text": (
        source('drop = "doublet"'),
        "own.toml, study mine: drop = 'doublet' is of another kind: list",
    ),
    "drop holds numbers": (
        source("drop = [1]"),
        "own.toml, study mine: drop holds 1, where text is due",
    ),
    "rename to a number": (
        source("rename = { a = 1 }"),
        "own.toml, study mine: rename holds 1, where text is due",
    ),
    "cell_type is a list": (
        source('cell_type = ["a"]'),
        r"own.toml, study mine: cell_type = \['a'\] is of another kind: str",
    ),
    "unknown setting": (
        source("settings.speed = 1"),
        "own.toml, study mine: reader table has no setting 'speed'; it has",
    ),
    "a setting of another kind": (
        source("settings.sep = 3"),
        "own.toml, study mine: settings: sep = 3 is of another kind: str",
    ),
    "no regular expression": (
        source('settings.gene = "("'),
        r"own.toml, study mine: settings.gene = '\(' is no regular expression",
    ),
    "collection is a number": (
        source(
            "",
            STUDY and '[[study.source]]\nreader = "h5ad"\ncellxgene = {{ collection = 3 }}{source}',
        ),
        "cellxgene: collection = 3 is of another kind",
    ),
    "no collection": (
        source("", '[[study.source]]\nreader = "h5ad"\ncellxgene = {{ tissue = "x" }}{source}'),
        "cellxgene: the field 'collection' is missing",
    ),
    "datasets is text": (
        source(
            "",
            '[[study.source]]\nreader = "h5ad"\ncellxgene = {{ collection = "c", datasets = "d"'
            " }}{source}",
        ),
        "cellxgene: datasets = 'd' is of another kind",
    ),
    "collection elsewhere": (
        source(
            "",
            '[[study.source]]\nreader = "h5ad"\ncellxgene = {{ collection = "/../../../x"'
            " }}{source}",
        ),
        "cellxgene: collection: '/../../../x' cannot be a name in the cache",
    ),
    "a second source": (
        WHOLE + SOURCE.format(source="drop = 1"),
        "own.toml, study mine, source 2: drop = 1 is of another kind",
    ),
}
NAMES = [
    "../x",
    "..",
    ".",
    "/abs/x",
    "a/b",
    "..\\x",
    "C:x",
    "C:\\x",
    "a\0b",
    "a\nb",
    " ",
    "x.",
    " x",
    ".hidden",
    "~root",
    "CON",
    "nul.h5ad",
    "a\u202eb",
    "x" * 250,
]
OURS = ["checksums.json", "cellxgene-1.json", "cells-1.h5ad", "a.part", "a.part.version"]


def read(text, tmp_path, monkeypatch):
    (tmp_path / "own.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    monkeypatch.setenv("VAMPSC_ORGANS", str(tmp_path / "own.toml"))
    monkeypatch.setenv("VAMPSC_CACHE", str(tmp_path / "cache"))
    return organs.registry()


def one_line(error):
    assert str(error.value).isprintable() and len(str(error.value)) < 900


@pytest.mark.parametrize("name", SLIPS)
def test_slip(name, tmp_path, monkeypatch):
    text, words = SLIPS[name]
    with pytest.raises(OrganError, match=words) as error:
        read(text, tmp_path, monkeypatch)
    one_line(error)


def test_what_is_right(tmp_path, monkeypatch):
    assert read(WHOLE, tmp_path, monkeypatch)["mine"]["organ"] == "skin"
    # as some editors of Windows write it
    assert read(b"\xef\xbb\xbf" + WHOLE.encode(), tmp_path, monkeypatch)["mine"]
    for text in (
        '{ name = "~/mine.tsv" }',
        '{ name = "/data/mine.tsv" }',
        '{ name = "../mine.tsv", urls = [] }',
    ):
        # a file of one's own may be anywhere: it is only read
        assert read(file(text), tmp_path, monkeypatch)["mine"]
    tables = WHOLE.replace('"table"', '"tables"')
    # the settings of table
    assert read(tables + 'settings.sep = ","', tmp_path, monkeypatch)["mine"]


@pytest.mark.parametrize("name", NAMES)
def test_a_study_or_file_that_would_lie_elsewhere(name, tmp_path, monkeypatch):
    with pytest.raises(
        OrganError,
        match="own.toml, study .*cannot be a name in the cache: it .*Take letters, digits",
    ) as error:
        read(named(name), tmp_path, monkeypatch)
    one_line(error)
    with pytest.raises(
        OrganError, match="own.toml, study mine: files.counts: .*cannot be a name in the cache: it"
    ) as error:
        read(kept_as(name), tmp_path, monkeypatch)
    one_line(error)


@pytest.mark.parametrize("name", OURS)
def test_names_of_the_caches_own_files(name, tmp_path, monkeypatch):
    with pytest.raises(
        OrganError, match="files.counts: name = .* is kept for the cache's own files"
    ):
        read(kept_as(name), tmp_path, monkeypatch)


def test_registry_that_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("VAMPSC_ORGANS", str(tmp_path))
    with pytest.raises(OrganError, match=f"registry {tmp_path} cannot be read: Is a directory"):
        organs.registry()


# ---- what CELLxGENE answers

API = "/api.cellxgene.cziscience.com/curation/v1/collections/c-1"
OF_CELLXGENE = """
[[study]]
name = "mine"
organ = "skin"
[[study.source]]
reader = "h5ad"
settings = { symbols = "feature_name", ensembl = "index" }
cellxgene = { collection = "c-1" }
cell_type = "cell_type"
"""


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "RETRY_SECONDS", 0.01)
    with Server().running() as server:
        monkeypatch.setenv("VAMPSC_MIRRORS", f"https://={server.address}/")
        read(OF_CELLXGENE, tmp_path, monkeypatch)
        yield server


def dataset(url, role="d-1"):
    return {
        "dataset_id": role,
        "tissue": [{"label": "skin"}],
        "assets": [{"filetype": "H5AD", "url": url}],
    }


def load():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*(Pandas4Warning|chained_assignment).*")
        return organs.load("mine", progress=False)


def files_in(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


URLS = {
    "dots": "https://x.example/..",
    "a dot": "https://x.example/.",
    "nothing": "https://x.example/",
    "no path": "https://x.example",
    "backslashes": "https://x.example/..\\..\\x.h5ad",
    "a drive": "https://x.example/C:x.h5ad",
    "NUL": "https://x.example/a\0b",
    "hidden": "https://x.example/.bashrc",
    "device": "https://x.example/NUL.h5ad",
    "the note": "https://x.example/cellxgene-c-1.json",
    "the record": "https://x.example/checksums.json",
    "only a query": "https://x.example/?f=../../x.h5ad",
}


@pytest.mark.parametrize("name", URLS)
def test_an_address_whose_file_would_lie_elsewhere(name, server, tmp_path):
    server.files[API] = json.dumps({"datasets": [dataset(URLS[name])]}).encode()
    before = files_in(tmp_path)
    with pytest.raises(
        DownloadError,
        match=(
            "CELLxGENE's collection c-1, dataset d-1: .*(cannot be a name in the cache|kept for the"
            " cache's own)"
        ),
    ) as error:
        load()
    one_line(error)
    assert files_in(tmp_path) == before and len(server.asked) == 1


@pytest.mark.parametrize(
    "answer, words",
    [
        ([], "the answer is of another form than known"),
        ("text", "the answer is of another form"),
        (None, "the answer is of another form"),
        ({"datasets": 3}, "the answer is of another form"),
        ({"datasets": ["x"]}, "the answer is of another form"),
        ({"datasets": [{}]}, "the answer is of another form"),
        ({"datasets": [dataset(["x"])]}, "dataset d-1: .'x'. is no address of a file"),
        ({"datasets": [dataset("file:///etc/hostname")]}, "is no address of a file"),
        (
            {"datasets": [dataset("https://x.example/a.h5ad", ["d"])]},
            "the answer is of another form",
        ),
        (
            {
                "datasets": [
                    dataset("https://x.example/a.h5ad"),
                    dataset("https://y.example/a.h5ad", "d-2"),
                ]
            },
            "dataset d-2: its file a.h5ad has the name of another dataset's",
        ),
        ({"datasets": []}, "has 0 datasets and none that is looked for"),
        ({}, "has 0 datasets and none"),
    ],
    ids=range(12),
)
def test_an_answer_of_another_form(answer, words, server, tmp_path):
    server.files[API] = json.dumps(answer).encode()
    with pytest.raises(DownloadError, match=words) as error:
        load()
    one_line(error)
    assert not list(tmp_path.rglob("cellxgene-*"))


@pytest.fixture
def published(server, tmp_path):
    """A study at CELLxGENE that can be had; its address has a key in it, which is no part of the
    file's name.
    """
    files, truth = layouts.write("Enge2017", "cellxgene", tmp_path / "published")
    server.files[API] = json.dumps(
        {"datasets": [dataset(f"https://x.example/{role}.h5ad?key=sesame", role) for role in files]}
    ).encode()
    for role, path in files.items():
        server.files[f"/x.example/{role}.h5ad"] = path.read_bytes()
    return files


def test_a_damaged_note_is_named(published, server, tmp_path):
    cells = load()
    (note,) = tmp_path.rglob("cellxgene-c-1.json")
    text = note.read_text()
    for damaged in (
        text[:20],
        "[]",
        "{}",
        "null",
        '{"d": {"name": "../x", "urls": ["https://x.example/x"]}}',
        "\x00",
        text.replace('"urls"', '"url"'),
    ):
        note.write_text(damaged)
        with pytest.raises(
            DownloadError,
            match=(
                "cellxgene-c-1.json is damaged; delete it, and it is fetched from CELLxGENE again"
            ),
        ) as error:
            load()
        one_line(error)
        # the list of all studies works
        assert not organs.table().set_index("study").loc["mine", "here"]
    note.unlink()
    assert load().shape == cells.shape and note.read_text() == text


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b[: len(b) // 2],
        lambda b: b"",
        lambda b: b"x" * len(b),
        lambda b: b[:100] + bytes(len(b) - 100),
    ],
)
def test_damaged_cells_are_read_again(damage, published, server, tmp_path):
    cells = load()
    (path,) = tmp_path.rglob("cells-*.h5ad")
    asked = len(server.asked)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match=f"{path} is damaged, and is made anew"):
        again = load()
    assert (again.X != cells.X).nnz == 0 and len(server.asked) == asked
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*is damaged.*")
        load()
