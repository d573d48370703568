"""The tables of a study: what is read, what is marked, what is compared, and what is called a
verdict.
"""

import json
import re
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
from scipy import stats

from vampsc import tables, training

EXACT = dict(active_units=100, pcs95=20, test_loss_per_gene=0.3, asw=0.1)
SAMPLED = dict(
    active_units=40,
    pcs95=30,
    active_units_10_samples=128,
    pcs95_10_samples=60,
    test_loss_per_gene=0.3,
    asw=0.1,
)


def history(n_after=100, n_before=1):
    """Losses of validation that fall to the best epoch and stay above it for so many; 100 is the
    patience of the profile `paper`.
    """
    losses = [*np.linspace(3, 2, n_before), 1.0, *[2.0] * n_after]
    return pd.DataFrame({"val_loss": losses}, pd.RangeIndex(1, len(losses) + 1, name="epoch"))


def make_run(
    out,
    organ,
    model,
    seed=0,
    cells=40,
    types=3,
    profile="paper",
    n_genes=19_986,
    labels=True,
    epochs=None,
    tested=0,
    **numbers,
):
    """A run folder of random numbers, as study.run writes it.

    epochs : a history, by default one that patience ended. tested : so many test cells, drawn anew
        for each seed.
    """
    rng = np.random.default_rng([seed, *map(ord, organ + model)])
    folder = Path(out) / organ / f"{model}-seed{seed}"
    folder.mkdir(parents=True)
    settings = {
        k: getattr(training.get_profile(profile), k) for k in training.Profile.__dataclass_fields__
    }
    numbers = {**(SAMPLED if model == "iaf" else EXACT), **numbers}
    numbers |= {"n_labelled": cells} if labels else {"asw": None}
    (folder / "config.json").write_text(
        json.dumps({"model": model, "seed": seed, "training": settings, "data": organ})
    )
    (folder / "metrics.json").write_text(
        json.dumps({"n_cells": cells, "n_genes": n_genes, **numbers})
    )
    (history() if epochs is None else epochs).to_csv(folder / "history.csv")
    np.save(folder / "latent.npy", rng.normal(size=(cells, 128)).astype("float32"))
    index = pd.Index([f"c{i}" for i in range(cells)], name="cell")
    rows = pd.DataFrame(
        {"split": "train", "label": [f"type {i % types}" for i in range(cells)]}, index
    )
    rows.iloc[np.random.default_rng(seed).permutation(cells)[:tested], 0] = "test"
    rows[["split", "label"] if labels else ["split"]].to_csv(folder / "cells.csv")
    return folder


def make_study(
    out,
    organ="liver",
    seeds=3,
    models=("ae", "vae", "iaf", "vamp"),
    labels=True,
    tested=0,
    **numbers,
):
    """All runs of an organ.

    tested : as in make_run. numbers : model -> {metric: a value, or one for each seed}.
    """
    for model in models:
        for seed in range(seeds):
            given = {
                k: v[seed] if isinstance(v, list) else v for k, v in numbers.get(model, {}).items()
            }
            make_run(out, organ, model, seed, labels=labels, tested=tested, **given)
    return out


def of(judged, words, organ="liver"):
    "The verdict on the one claim that contains the words."
    row = judged[judged["claim"].str.contains(words, regex=False) & (judged["organ"] == organ)]
    assert len(row) == 1
    return row.iloc[0]


# ---- the paper's numbers


def test_the_papers_numbers_and_marks_are_the_papers():
    paper = Path(__file__).resolve().parents[3] / "shared" / "paper"
    if not paper.is_dir():
        pytest.skip("needs the paper's tables in ../shared/paper, which the project does not ship")
    ours = tables.paper_tables().set_index(["organ", "model"])
    one, two = (pd.read_csv(paper / f"table{k}.csv").set_index(["organ", "model"]) for k in (1, 2))
    assert ours["active_units"].equals(one["active_units"]) and ours["pcs95"].equals(one["pcs95"])
    assert ours["test_loss_per_gene"].equals(
        two["test_reconstruction_loss"].rename("test_loss_per_gene")
    )
    assert ours["asw"].equals(two["asw_cell_type"].rename("asw"))
    for metric in ("active_units", "pcs95"):
        for organ, group in ours.groupby("organ"):
            best = one.loc[organ][f"best_{metric}"]
            assert tables.marks(group[metric].droplevel(0), metric) == {
                m: "bold" for m in best.index[best == "yes"]
            }


def test_the_papers_table_2_has_its_italics():
    found = {
        k: {
            o: tables.marks(g.set_index("model")[k], k).get("AE")
            for o, g in tables.paper_tables().groupby("organ")
        }
        for k in ("test_loss_per_gene", "asw")
    }
    italic = {k: " ".join(o for o, mark in marks.items() if mark) for k, marks in found.items()}
    assert italic == {
        "test_loss_per_gene": "blood bone colon esophagus liver spleen",
        "asw": "colon esophagus kidney liver pancreas placenta",
    }


def test_marks_of_ties_and_gaps():
    # alike
    assert tables.marks({"VAE": 0.12341, "IAF": 0.12344, "VAMP": 0.1}, "asw") == {
        "VAE": "bold",
        "IAF": "bold",
    }
    assert tables.marks({"AE": 1, "VAMPIAF": 2}, "pcs95") == {} == tables.marks({}, "asw")
    assert tables.marks({"AE": 0.5, "VAE": np.nan, "VAMP": 0.4, "HVAMP": 0.9}, "asw") == {
        "VAMP": "bold",
        "AE": "italic",
    }
    assert tables.marks({"AE": 0.4, "VAMP": 0.4}, "asw") == {"VAMP": "bold"}  # equal is not better
    # no italics in Table 1
    assert tables.marks({"AE": 128, "VAE": 12, "VAMP": 90}, "active_units") == {"VAMP": "bold"}


# ---- reading


def test_a_whole_study_has_no_problems(tmp_path):
    runs, problems = tables.gather(make_study(make_study(tmp_path), "blood-facs", 1))
    assert (
        not problems and len(runs) == 16 and list(runs["organ"].unique()) == ["blood-facs", "liver"]
    )
    assert list(runs["model"].unique()) == ["AE", "VAE", "IAF", "VAMP"]
    assert list(runs["paper_organ"].unique()) == ["blood", "liver"]
    assert (
        (runs["units"] == 128).all()
        and set(runs["profile"]) == {"paper"}
        and not runs["unlike_the_paper"].any()
    )
    assert tables.missing(runs)["liver"] == [] and len(tables.missing(runs)["blood-facs"]) == 8
    iaf, vae = (runs[runs["model"] == m].iloc[0] for m in ("IAF", "VAE"))
    assert (
        iaf["sampled"]
        and iaf["pcs95_10_samples"] == 60
        and not vae["sampled"]
        and vae["pcs95_10_samples"] == 20
    )


@pytest.mark.parametrize(
    "name", ["config.json", "metrics.json", "history.csv", "latent.npy", "cells.csv"]
)
@pytest.mark.parametrize("content", ["", "[1, 2]", None])
def test_a_damaged_run_is_named_and_left_out(tmp_path, name, content):
    make_study(tmp_path)
    path = tmp_path / "liver" / "vae-seed1" / name
    path.unlink() if content is None else path.write_text(content)
    if (name, content) == ("history.csv", "[1, 2]"):
        path.write_bytes(b"\xff\xfe\x00")
    runs, problems = tables.gather(tmp_path)
    assert (
        len(runs) == 11
        and len(problems) == 1
        and "vae-seed1" in problems[0]
        and "\n" not in problems[0]
    )
    assert tables.missing(runs)["liver"] == ["vae-seed1"]


def test_a_folder_with_another_run_or_other_cells_is_left_out(tmp_path):
    make_study(tmp_path)
    (tmp_path / "liver" / "vae-seed0").rename(tmp_path / "liver" / "vae-seed7")
    np.save(tmp_path / "liver" / "ae-seed0" / "latent.npy", np.zeros((3, 8)))
    runs, problems = tables.gather(tmp_path)
    assert (
        len(runs) == 10
        and "vae-seed7 holds the run vae-seed0" in problems[1]
        and "(3, 40, 40) cells" in problems[0]
    )


def test_runs_that_are_not_alike_are_named(tmp_path):
    make_run(tmp_path, "liver", "ae", 0, profile="quick", n_genes=4000)
    make_run(tmp_path, "liver", "vae", 0, labels=False, pcs95=None)
    _, problems = tables.gather(tmp_path)
    text = " ".join(problems)
    assert "numbers of genes (4000; 19986)" in text and "training settings (quick; paper)" in text
    assert "not all of its runs were judged" in text and "vae-seed0 has no number for PCs" in text


def test_cells_are_described_by_a_file_or_without_it(tmp_path):
    make_study(make_study(make_study(tmp_path), "spleen", 1), "blood-facs", 1)
    (tmp_path / "liver" / "cells.json").write_text(
        json.dumps(
            {
                "organ": "liver",
                "title": "Liver & more",
                "studies": {"MacParland": 30, "Aizarani": 10},
                "n_labelled": 35,
                "cell_types": 12,
                "paper": True,
            }
        )
    )
    (tmp_path / "spleen" / "cells.json").write_text('{"studies": 3}')
    (tmp_path / "blood-facs" / "cells.json").write_text('{"title": "/some/where/blood.h5ad"}')
    (tmp_path / "colon").mkdir()
    (tmp_path / "colon" / "cells.json").write_text("{}")
    runs, problems = tables.gather(tmp_path)
    assert (
        len(problems) == 2
        and "colon has no finished run" in problems[0]
        and "spleen/cells.json is damaged" in problems[1]
    )
    what = tables.overview(runs).set_index("organ")
    assert list(what.loc["Liver & more", ["cells", "with a label", "cell types"]]) == [
        "40",
        "35",
        "12",
    ]
    assert what.loc["Liver & more", "studies"] == "MacParland (30 cells), Aizarani (10 cells)"
    assert list(what.index) == ["blood-facs", "Liver & more", "spleen"]
    assert list(what["the paper's data"]) == ["not known", "probably (a guess)", "not known"]
    assert (
        what.loc["spleen", "cell types"] == "3"
        and what.loc["spleen", "runs"] == "AE, VAE, IAF, VAMP: seed 0"
    )
    said = " ".join(tables.caveats(runs))
    assert (
        "Liver & more: probably the paper's data" in said
        and "one seed only" in said
        and "20,000 genes" not in said
    )


def test_a_study_unlike_the_papers_says_so(tmp_path):
    make_run(
        tmp_path, "liver", "ae", profile=training.get_profile("quick", max_epochs=4), n_genes=4000
    )
    said = " ".join(tables.caveats(tables.gather(tmp_path)[0]))
    for words in (
        "learning_rate 0.004 instead of 5e-05",
        "lr_patience none instead of 10",
        "max_epochs 4 instead of 10000",
        "n_genes 4000 instead of all",
        "not on the paper's scale",
    ):
        assert words in said, words


def test_wrong_folders_and_organs_are_one_line(tmp_path):
    for call in (tables.gather, tables.make):
        with pytest.raises(ValueError, match="there is no folder"):
            call(tmp_path / "none")
        make_study(tmp_path / call.__name__, seeds=1)
        with pytest.raises(ValueError, match="'livr' has no runs .* there are liver"):
            call(tmp_path / call.__name__, "livr")
    (tmp_path / "empty").mkdir()
    for call in (tables.gather, tables.make):
        with pytest.raises(ValueError, match="holds no finished run in folders <organ>"):
            call(tmp_path / "empty")
    assert set(
        tables.gather(make_study(tmp_path / "gather", "colon", 1), ["colon"])[0]["organ"]
    ) == {"colon"}
    (tmp_path / "one" / "liver" / "vae-seed0").mkdir(parents=True)
    with pytest.raises(ValueError, match="vae-seed0 is not finished"):
        tables.gather(tmp_path / "one")


def test_co_variation_counts_the_most_active_units():
    rng = np.random.default_rng(0)
    z = np.hstack(
        [np.repeat(rng.normal(size=(500, 1)), 3, 1) * [1, -2, 3], 0.2 * rng.normal(size=(500, 5))]
    )
    assert tables.co_variation(z, 3) == pytest.approx(1) and tables.co_variation(z) < 0.2
    assert np.isnan(tables.co_variation(np.ones((10, 4)))) and np.isnan(tables.co_variation(z, 0))


# ---- tables


def test_intervals_by_the_number_of_seeds(tmp_path):
    make_study(
        tmp_path, "liver", 3, vae=dict(pcs95=[3, 4, 5]), vamp=dict(active_units=[128, 128, 127])
    )
    make_study(tmp_path, "spleen", 2, vae=dict(pcs95=[3, 5]))
    make_study(tmp_path, "colon", 1, models=("vae",))
    one = tables.table_1(tables.gather(tmp_path)[0])

    def of_pcs(organ):
        return list(one.loc[(organ, "VAE"), ["pcs95", "pcs95_low", "pcs95_high", "pcs95_seeds"]])

    assert np.allclose(of_pcs("liver"), [4, 4 - 2.484, 4 + 2.484, 3], atol=1e-3) and of_pcs(
        "spleen"
    ) == [4, 3, 5, 2]
    # there are no more units
    assert np.isnan(of_pcs("colon")[1]) and one.loc[("liver", "VAMP"), "active_units_high"] == 128
    text = tables.show(one)
    assert (
        "<b>4</b><br><small>[1.5, 6.5]</small>" in text
        and "(3 to 5)" in text
        and "<b>20</b></td>" in text
    )


def test_the_layout_is_the_papers(tmp_path):
    models = ("vamp", "ae", "vae", "iaf", "hvamp")
    runs, _ = tables.gather(
        make_study(tmp_path, seeds=1, models=models, ae=dict(asw=0.2, test_loss_per_gene=0.2))
    )
    table = tables.table_2(runs)
    text = tables.show(table)
    heads = re.findall("<th [^>]*>(.*?)</th>", text)
    assert heads == [
        "",
        "test loss per gene",
        "ASW cell type",
        "organ",
        *["AE", "VAE", "IAF", "VAMP"] * 2,
        "liver",
    ]
    assert (
        text.count("<i>") == 2
        and "<i>0.20000</i>" in text
        and text.count("<b>") == 6
        and "Italics" in text
    )
    others = tables.show(table, ["HVAMP"])
    assert ">HVAMP<" in others and "<b>" not in others and "Bold" not in others
    assert (
        "Italics" not in tables.show(tables.table_1(runs))
        and tables.show(tables.table_1(runs)).count(">IAF<") == 4
    )


def test_titles_are_escaped_and_texts_whole(tmp_path):
    make_study(tmp_path, seeds=1)
    (tmp_path / "liver" / "cells.json").write_text(json.dumps({"title": "<b>&"}))
    runs, _ = tables.gather(tmp_path)
    for shown in (
        tables.show(tables.table_1(runs)),
        tables.show_beside(tables.beside_the_paper(runs)),
    ):
        assert "&lt;b&gt;&amp;" in shown
    long = "word " * 50
    text = tables.show_words(pd.DataFrame({"a": [long, np.nan]}))
    assert long in text and ">-<" in text


# ---- beside the paper


def test_what_can_be_compared_is_said(tmp_path):
    make_study(make_study(make_study(tmp_path), "blood-facs", 1), "lung", 1)
    make_run(tmp_path, "spleen", "vae", n_genes=4000, profile="quick")
    (tmp_path / "liver" / "cells.json").write_text('{"paper": true}')
    (tmp_path / "spleen" / "cells.json").write_text('{"paper": false}')
    beside = tables.beside_the_paper(tables.gather(tmp_path)[0])
    compare = beside.drop_duplicates("organ").set_index("organ")["compare"]
    assert compare.to_dict() == {
        "liver": "digits, if the guess of the data is right",
        "blood-facs": "order only: perhaps other cells",
        "spleen": "order only: other cells, other training, another number of genes",
    }
    at = beside.set_index(["organ", "metric", "model"])
    assert at.loc[("liver", "pcs95", "VAMP"), "difference"] == 20 - 11
    assert at.loc[("liver", "active_units_10_samples", "IAF"), "difference"] == 0
    assert at.loc[("liver", "active_units", "IAF"), "difference"] == 40 - 128
    assert np.isnan(at.loc[("spleen", "test_loss_per_gene", "VAE"), "difference"])
    assert at.loc[("blood-facs", "asw", "VAE"), ["paper", "rank_ours", "rank_paper"]].isna().all()
    order = tables.orders(beside).set_index(["organ", "metric"])
    assert (
        order.loc[("blood-facs", "ASW cell type"), "what can be compared"]
        == "the paper has no number"
    )
    assert order.loc[("liver", "PCs for 95 %")].tolist()[:3] == [
        "AE = VAE = VAMP, IAF",
        "VAMP, VAE, AE, IAF",
        "3 of 6",
    ]


def test_the_papers_own_numbers_agree_with_themselves(tmp_path):
    for row in tables.paper_tables().dropna().itertuples():
        make_run(
            tmp_path,
            row.organ,
            row.model.lower(),
            **{k: getattr(row, k) for k in EXACT},
            **(
                {f"{k}_10_samples": getattr(row, k) for k in ("active_units", "pcs95")}
                if row.model == "IAF"
                else {}
            ),
        )
    beside = tables.beside_the_paper(tables.gather(tmp_path)[0])
    assert (beside["difference"].abs() < 1e-12).all() and beside["rank_ours"].equals(
        beside["rank_paper"]
    )
    assert set(tables.orders(beside)["pairs alike"]) == {"6 of 6"}
    colon = beside[(beside["organ"] == "colon") & (beside["metric"] == "pcs95")].set_index("model")
    assert colon["rank_ours"].to_dict() == {"AE": 1, "VAE": 4, "IAF": 3, "VAMP": 1}
    assert "(1)" in tables.show_beside(beside, tables.IN_TABLE_2)


def test_a_study_without_the_papers_organs_has_nothing_beside_it(tmp_path):
    beside = tables.beside_the_paper(tables.gather(make_study(tmp_path, "lung", 1))[0])
    assert (
        len(beside) == 0
        and len(tables.orders(beside)) == 0
        and "<table>" in tables.show_beside(beside)
    )


# ---- verdicts


def test_one_seed_tells_nothing_but_a_direction(tmp_path):
    judged = tables.verdicts(tables.gather(make_study(tmp_path, seeds=1, vamp=dict(asw=0.9)))[0])
    assert set(judged["verdict"]) == {"cannot be told"}
    assert of(judged, "separates")[["direction", "seeds"]].tolist() == ["as claimed", 1]
    # all are equal
    assert of(judged, "lowest test loss")["direction"] == "not as claimed"


def test_runs_are_paired_by_seed(tmp_path):
    """A hard split raises both losses: the intervals of the two models overlap, that of their
    differences does not include 0.
    """
    make_study(
        tmp_path,
        vae=dict(test_loss_per_gene=[0.30, 0.35, 0.40]),
        vamp=dict(test_loss_per_gene=[0.29, 0.339, 0.391]),
    )
    runs, _ = tables.gather(tmp_path)
    two = tables.table_2(runs).loc["liver"]
    assert two.loc["VAMP", "test_loss_per_gene_high"] > two.loc["VAE", "test_loss_per_gene_low"]
    found = of(tables.verdicts(runs), "The VAMP has a lower test loss")
    assert (
        found["verdict"] == "holds"
        and found["numbers"] == "VAE 0.35000 - VAMP 0.34000 = 0.01000 [0.00752, 0.01248]"
    )
    # one pair is left
    for seed in (0, 1):
        (tmp_path / "liver" / f"vamp-seed{seed}" / "metrics.json").unlink()
    found = of(tables.verdicts(tables.gather(tmp_path)[0]), "The VAMP has a lower test loss")
    assert found["verdict"] == "cannot be told" and found["seeds"] == 1


@pytest.mark.parametrize("fewer, verdict", [(1, "cannot be told"), (2, "holds")])
def test_equal_counts_are_not_certain(tmp_path, fewer, verdict):
    "Three seeds with one PC less each: less than what rounding can do. With two less: more."
    runs, _ = tables.gather(make_study(tmp_path, vamp=dict(pcs95=20 - fewer)))
    assert (
        of(tables.verdicts(runs), "fewer PCs than AE, VAE and IAF, counted without")["verdict"]
        == verdict
    )


def test_claims_of_several_comparisons(tmp_path):
    losses = dict(
        ae=[0.25, 0.26, 0.2701],
        vae=[0.30, 0.31, 0.32],
        iaf=[0.301, 0.3111, 0.3209],
        vamp=[0.299, 0.309, 0.3191],
    )
    make_study(
        tmp_path, **{model: dict(test_loss_per_gene=values) for model, values in losses.items()}
    )
    judged = tables.verdicts(tables.gather(tmp_path)[0])
    assert of(judged, "The IAF has a lower test loss")["verdict"] == "does not hold"
    assert (
        of(judged, "IAF or VAMP, or both")["verdict"] == "holds"
        and of(judged, "AE has the lowest")["verdict"] == "holds"
    )
    assert (
        of(judged, "competitive")["verdict"] == "holds"
        and of(judged, "separates")["verdict"] == "cannot be told"
    )
    for seed in range(3):
        (tmp_path / "liver" / f"ae-seed{seed}" / "metrics.json").unlink()
    found = of(tables.verdicts(tables.gather(tmp_path)[0]), "AE has the lowest")
    assert found[["verdict", "direction", "seeds"]].tolist() == ["cannot be told", "unknown", 0]
    assert found["numbers"].startswith("AE: no run")


def test_active_and_inactive_units(tmp_path):
    active = {
        "liver": dict(vae=[20, 21, 20], vamp=[110, 112, 115], iaf=128),
        "colon": dict(vae=128, vamp=128, iaf=[33, 34, 33]),
    }
    for organ, units in active.items():
        make_study(tmp_path, organ, **{m: dict(active_units=n) for m, n in units.items()})
    judged = tables.verdicts(tables.gather(tmp_path)[0])
    numbers = re.fullmatch(
        r"VAE 0.159 \[(.*), (.*)\], claimed below 0.2", of(judged, "fewer than 20 %")["numbers"]
    )
    assert float(numbers[1]) < 0.159 < float(numbers[2]) < 0.2
    assert (
        of(judged, "fewer than 20 %")["verdict"] == "holds"
        and of(judged, "more active units")["verdict"] == "holds"
    )
    assert of(judged, "fewer than 20 %", "colon")["verdict"] == "does not hold"
    # the VAE has no inactive unit
    assert of(judged, "more active units", "colon")["verdict"] == "does not apply"
    inactive = judged[judged["claim"].str.contains("no inactive unit")].set_index(
        ["organ", "claim"]
    )["verdict"]
    assert list(inactive["liver"]) == ["holds", "holds"] and list(inactive["colon"]) == [
        "does not hold",
        "holds",
    ]
    over = tables.over_organs(judged).set_index("claim")
    row = over.loc["The VAMP has more active units than the VAE, where the VAE has inactive ones"]
    assert row["organs"] == 1 and row["verdict"] == "holds" and row["in the paper"] == "6 of 6"


def test_unlabelled_organs_are_not_counted(tmp_path):
    make_study(make_study(tmp_path, "liver", 3, vamp=dict(asw=0.5)), "blood", 2, labels=False)
    runs, problems = tables.gather(tmp_path)
    judged = tables.verdicts(runs)
    assert not problems and of(judged, "separates", "blood")["verdict"] == "does not apply"
    over = tables.over_organs(judged).set_index("claim")
    row = over.loc["The VAMP separates cell types better than VAE and IAF (ASW)"]
    assert row[["verdict", "organs", "as claimed"]].tolist() == ["holds", 1, "1 of 1"]
    assert "<td" in tables.show(tables.table_2(runs)) and "none" in set(
        tables.overview(runs)["with a label"]
    )


def test_over_organs_whatever_the_open_ones_are():
    claim = tables.Claim("0", "c", "asw", (), "more than half")

    def judged(*v):
        return pd.DataFrame(
            {
                "claim": "c",
                "verdict": v,
                "direction": "as claimed",
                "in the paper": "-",
                "title": "t",
            }
        )

    def verdict(needs, *v):
        return tables._over(needs, *(v.count(x) for x in (tables.HOLDS, tables.FAILS, tables.OPEN)))

    H = tables.HOLDS
    F = tables.FAILS
    O = tables.OPEN
    assert [verdict("more than half", *v) for v in ((H, H, O), (H, F, O), (H, F))] == [H, O, F]
    assert (
        verdict("all", H, H, O) == O
        and verdict("all", H, O, F) == F
        and verdict("all") == "does not apply"
    )
    nine = [verdict("all but one", *[H] * 7, *v) for v in ((H, F), (H, O), (O, F), (F, F))]
    # one of three is no exception of nine
    assert nine == [H, H, O, F] and verdict("all but one", H, H, F) == F
    with pytest.MonkeyPatch.context() as m:
        m.setattr(tables, "_in_the_paper", lambda claims: {"c": "1 of 1"})
        row = tables.over_organs(judged(H, H, O, "does not apply"), [claim]).iloc[0]
        untested = tables.over_organs(judged(H, tables.UNTESTED, tables.UNTESTED), [claim]).iloc[0]
    assert row["organs"] == 3 and row["verdict"] == H and row["as claimed"] == "3 of 3"
    assert untested["verdict"] == O and untested[[H, O, tables.UNTESTED]].tolist() == [1, 0, 2]


def test_decisions_err_as_often_as_they_say():
    """At the bound, three seeds call a verdict in 5 % of studies, half of them to either side; far
    from it, in most.
    """
    draws = np.random.default_rng(0).normal(size=(4000, 3))
    called = [tables.decide(d)[0] for d in draws]
    assert (
        0.015 < called.count("holds") / 4000 < 0.035
        and 0.015 < called.count("does not hold") / 4000 < 0.035
    )
    assert [tables.decide(d + 10)[0] for d in draws[:500]].count("holds") > 450


# ---- what a verdict may rest on


def at_its_end(folder):
    "Whether the one run of a folder was trained to its end, and why not."
    row = tables.gather(folder)[0].iloc[0]
    assert row["at_its_end"] == (row["why_not_at_its_end"] == "")
    return row["why_not_at_its_end"]


@pytest.mark.parametrize(
    "changes, after, why",
    [
        ({}, 100, ""),
        ({}, 99, "ended by max_epochs 10000, 99 epochs after its best"),
        (dict(patience=45), 45, ""),
        (dict(patience=44), 44, "patience 44, below 45"),
        (dict(max_epochs=60), 58, "ended by max_epochs 60, 58 epochs after its best"),
        ({"patience": 60, "max_epochs": 62}, 60, ""),
    ],
)
def test_the_end_by_patience(tmp_path, changes, after, why):
    make_run(
        tmp_path,
        "liver",
        "vae",
        profile=training.get_profile("paper", **changes),
        epochs=history(after),
    )
    assert at_its_end(tmp_path) == why


def test_losses_of_a_warm_up_are_no_best(tmp_path):
    """The lowest loss is that of the first epoch, at a small weight of the KL term; patience counts
    from the best of those after it.
    """
    losses = pd.DataFrame(
        {"val_loss": [0.1, 3.0, *[4.0] * 99]}, pd.RangeIndex(1, 102, name="epoch")
    )
    make_run(
        tmp_path, "liver", "vae", profile=training.get_profile("paper", kl_warmup=1), epochs=losses
    )
    assert at_its_end(tmp_path) == "ended by max_epochs 10000, 99 epochs after its best"


@pytest.mark.parametrize(
    "changes, done, why",
    [
        ({}, 3036, ""),
        ({}, 3000, "ended after 3000 of 3036 epochs"),
        (dict(max_epochs=20), 20, "ended by max_epochs 20 after 20 of 3036 epochs"),
        (dict(steps=3036), 3036, ""),
        (dict(steps=50), 50, "steps 50, 50 epochs, where steps 'auto' are 3036"),
        (dict(max_epochs=5000), 3036, ""),
        (dict(kl_warmup=3000), 3036, ""),
    ],
)
def test_the_end_by_steps(tmp_path, changes, done, why):
    """For 40 training cells and the default network, whose widest layer has 512 units, the rule
    asks for 150 * 128 / sqrt(40) / 4 = 759 epochs.
    """
    folder = make_run(
        tmp_path,
        "liver",
        "vae",
        profile=training.get_profile("quick", **changes),
        epochs=history(done - 2),
    )
    narrow = json.loads((folder / "config.json").read_text()) | {"settings": {"hidden": [16]}}
    # 759 epochs were enough
    if not changes:
        assert at_its_end(tmp_path) == ""
    # and a narrow one for four times as many
    (folder / "config.json").write_text(json.dumps(narrow))
    assert at_its_end(tmp_path) == why


def test_a_wide_autoencoder_is_at_its_end_after_fewer_steps(tmp_path):
    "Its rule is that of its training: 759 epochs divided by 4 once more."
    epochs = training.get_profile("quick").epochs(40, 512, has_kl=False)
    for model, why in (("ae", ""), ("vae", f"ended after {epochs} of 759 epochs")):
        make_run(
            tmp_path / model,
            "liver",
            model,
            profile=training.get_profile("quick"),
            epochs=history(epochs - 2),
        )
        assert at_its_end(tmp_path / model) == why


def test_runs_of_an_older_version_are_read(tmp_path):
    "Their settings know neither steps nor beta_2, their history may lack a column."
    folder = make_run(tmp_path, "liver", "vae")
    config = json.loads((folder / "config.json").read_text())
    for name in ("steps", "beta_2", "kl_warmup"):
        del config["training"][name]
    (folder / "config.json").write_text(
        json.dumps({**config, "training": {**config["training"], "of_another_time": 1}})
    )
    assert at_its_end(tmp_path) == ""
    (folder / "history.csv").write_text("epoch,loss\n1,2.0\n")
    assert at_its_end(tmp_path) == "its history has no validation loss"


def shorten(folder, models, organ="liver", seeds=(0, 1, 2)):
    "Give these runs a history that was cut."
    for model in models:
        for seed in seeds:
            history(20).to_csv(folder / organ / f"{model}-seed{seed}" / "history.csv")


def test_a_claim_is_not_judged_by_runs_that_were_cut(tmp_path):
    make_study(
        tmp_path,
        vae=dict(test_loss_per_gene=[0.31, 0.311, 0.312]),
        ae=dict(test_loss_per_gene=[0.2, 0.21, 0.2]),
        vamp=dict(active_units=128),
        iaf=dict(test_loss_per_gene=0.3),
    )
    before = tables.verdicts(tables.gather(tmp_path)[0])
    shorten(tmp_path, ["vamp"], seeds=[1])
    runs, _ = tables.gather(tmp_path)
    judged = tables.verdicts(runs)
    assert (
        of(before, "The VAMP has a lower test loss")["verdict"]
        == "holds"
        == of(judged, "The IAF has a lower")["verdict"]
    )
    found = of(judged, "The VAMP has a lower test loss")
    assert found[["verdict", "direction", "seeds"]].tolist() == [
        "not tested by this training",
        "as claimed",
        3,
    ]
    assert found["numbers"] == of(before, "The VAMP has a lower test loss")["numbers"]
    assert of(judged, "AE has the lowest")["verdict"] == "not tested by this training"
    # the IAF, which was trained to its end, is enough
    assert of(judged, "IAF or VAMP, or both")["verdict"] == "holds"
    over = (
        tables.over_organs(judged)
        .set_index("claim")
        .loc["The VAMP has a lower test loss than the VAE"]
    )
    assert over[["verdict", "holds", "cannot be told", "not tested by this training"]].tolist() == [
        "cannot be told",
        0,
        0,
        1,
    ]
    said = [sentence for sentence in tables.caveats(runs) if "trained to their end" in sentence]
    assert (
        len(said) == 1
        and said[0].startswith("liver: not all runs")
        and "VAMP: ended by max_epochs 10000, 20 epochs" in said[0]
    )


def test_that_a_claim_does_not_apply_is_a_verdict_too(tmp_path):
    "A VAE that was cut has no inactive unit; trained to its end it may have."
    make_study(
        make_study(tmp_path, vae=dict(active_units=128)), "colon", vae=dict(active_units=128)
    )
    shorten(tmp_path, ["vae"])
    judged = tables.verdicts(tables.gather(tmp_path)[0])
    assert of(judged, "more active units")["verdict"] == "not tested by this training"
    assert of(judged, "more active units", "colon")["verdict"] == "does not apply"


def test_organ_beside_organ(tmp_path):
    "The paper itself prints 128 active units for the VAE of the pancreas, and 21 for the liver."
    for organ in ("pancreas", "liver", "lung"):
        make_study(tmp_path, organ, vae=dict(active_units=128), vamp=dict(pcs95=9))
    judged = tables.verdicts(tables.gather(tmp_path)[0])
    pancreas, liver, lung = (
        of(judged, "fewer than 20 %", organ) for organ in ("pancreas", "liver", "lung")
    )
    assert [row["in the paper"] for row in (pancreas, liver, lung)] == [
        "not as claimed",
        "as claimed",
        "-",
    ]
    assert pancreas["direction"] == liver["direction"] == "not as claimed"
    assert (
        pancreas["beside the paper"]
        == "the paper's own numbers are not as claimed either: VAE 1.000, claimed below 0.2"
    )
    assert (
        liver["beside the paper"]
        == "unlike ours, the paper's own numbers are as claimed: VAE 0.164, claimed below 0.2"
    )
    assert lung["beside the paper"] == "the paper prints no number of it"
    # it prints pictures
    assert of(judged, "vary together more", "liver")["in the paper"] == "-"
    assert (
        of(judged, "more active units", "pancreas")["beside the paper"]
        == "does not apply to the paper's own numbers: VAE 0 inactive units"
    )
    over = tables.over_organs(judged).set_index("claim")
    row = over.loc["In the VAE fewer than 20 % of the units are active"]
    assert row[["agrees with the paper's table", "in the paper"]].tolist() == ["1 of 2", "6 of 9"]
    assert (
        row["beside the paper"]
        == "pancreas: not as claimed, and not in the paper's own table either; "
        "liver: not as claimed here, but as claimed in the paper's own table"
    )
    fewer = over.loc[
        "The VAMP needs fewer PCs than AE, VAE and IAF, counted without sampling noise"
    ]
    assert fewer[["agrees with the paper's table", "beside the paper"]].tolist() == [
        "2 of 2",
        "all as claimed, here and in the paper's own table",
    ]
    assert (
        over.loc[
            "Units vary together more in the VAMP than in VAE and IAF",
            "agrees with the paper's table",
        ]
        == "-"
    )


def test_numbers_without_sampling_noise_are_taken_where_they_are(tmp_path):
    make_study(
        tmp_path, seeds=2, iaf=dict(asw=0.1, asw_split_half=0.3, co_variation_split_half=0.25)
    )
    make_study(tmp_path, "colon", seeds=1)
    runs, _ = tables.gather(tmp_path)
    iaf = runs[runs["model"] == "IAF"].set_index("organ")
    assert iaf.loc["liver", ["asw", "co_variation"]].to_numpy().tolist() == [[0.3, 0.25]] * 2
    assert iaf.loc["colon", "asw"] == 0.1 and iaf.loc["colon", "co_variation"] < 0.2
    assert runs["asw_noisy"].sum() == runs["co_variation_noisy"].sum() == 1
    two = tables.table_2(runs)
    assert two.loc[("liver", "IAF"), "asw"] == 0.3
    said = (
        "The ASW of IAF (colon) is of a mean of samples, whose noise lowers it: these runs were"
        " judged before that was taken out."
    )
    assert (
        said in tables.show(two)
        and "noise" not in tables.show(two.loc[["liver"]])
        and "noise" not in tables.show(tables.table_1(runs))
    )
    assert tables.noise_said(runs, "co_variation").startswith(
        "The mean |correlation| of IAF (colon) is of a mean of samples"
    )
    judged = tables.verdicts(runs)
    assert (
        "IAF 0.100 = 0.000 (IAF with sampling noise)" in of(judged, "separates", "colon")["numbers"]
    )
    assert "noise" not in of(judged, "separates")["numbers"]


def test_seeds_that_divide_the_same_cells_anew(tmp_path):
    """40 cells, 8 of which are tested on: the interval is sqrt(1/3 + 8/32) / sqrt(1/3) times as
    wide.
    """
    losses = dict(
        vae=dict(test_loss_per_gene=[0.30, 0.35, 0.40]),
        vamp=dict(test_loss_per_gene=[0.29, 0.339, 0.391]),
    )
    make_study(tmp_path, **losses)
    make_study(tmp_path, "colon", tested=8, **losses)
    runs, _ = tables.gather(tmp_path)
    colon = runs[runs["organ"] == "colon"]
    assert (
        tables.test_ratio(colon) == 0.25 and tables.test_ratio(runs[runs["organ"] == "liver"]) == 0
    )
    # not known
    assert tables.test_ratio(colon.drop(columns="test_cells")) == 0
    half = 4.3027 * 0.001 * np.sqrt(1 / 3 + 1 / 4)
    numbers = of(tables.verdicts(runs), "The VAMP has a lower test loss", "colon")["numbers"]
    assert numbers == f"VAE 0.35000 - VAMP 0.34000 = 0.01000 [{0.01 - half:.5f}, {0.01 + half:.5f}]"
    two = (
        tables.table_2(runs)["test_loss_per_gene_high"] - tables.table_2(runs)["test_loss_per_gene"]
    )
    assert two[("colon", "VAE")] / two[("liver", "VAE")] == pytest.approx(np.sqrt(1.75))
    # the same test cells for all seeds
    for seed in range(3):
        for model in ("ae", "vae", "iaf", "vamp"):
            (tmp_path / "colon" / f"{model}-seed{seed}" / "cells.csv").write_text(
                (tmp_path / "colon" / "ae-seed0" / "cells.csv").read_text()
            )
    assert tables.test_ratio(tables.gather(tmp_path, "colon")[0]) == 0


def test_coverage_where_the_same_cells_are_divided_anew():
    """The plain interval of the loss of a mean over 10 resplits of 400 cells misses its true value
    far too often; the corrected one does not.
    """
    rng = np.random.default_rng(0)
    found = []
    for _ in range(600):
        cells = rng.normal(size=400)
        orders = [rng.permutation(cells) for _ in range(10)]
        found.append([np.mean((order[:80] - order[80:].mean()) ** 2) for order in orders])
    # variance of a new cell around a mean of 320
    truth = 1 + 1 / 320

    def coverage(ratio):
        return np.mean(
            [
                low < truth < high
                for _, low, high in (tables.interval(v, ratio=ratio) for v in found)
            ]
        )

    assert coverage(0) < 0.8
    assert 0.93 < coverage(80 / 320) < 0.98


def test_losses_of_other_test_cells_are_not_compared(tmp_path):
    make_study(tmp_path, tested=8, vamp=dict(test_loss_per_gene=0.2, asw=0.5))
    path = tmp_path / "liver" / "vamp-seed1" / "cells.csv"
    path.write_text((tmp_path / "liver" / "vamp-seed0" / "cells.csv").read_text())
    runs, problems = tables.gather(tmp_path)
    assert problems == [
        "liver: its models were not tested on the same cells with seed 1, so their test losses are"
        " not compared."
    ]
    judged = tables.verdicts(runs)
    found = of(judged, "The VAMP has a lower test loss")
    assert found[["verdict", "direction", "numbers"]].tolist() == [
        "cannot be told",
        "unknown",
        "VAE and VAMP were tested on other cells with seed 1",
    ]
    assert of(judged, "competitive")["verdict"] == "holds"  # by all cells
    assert "tested on other" not in of(judged, "The IAF has a lower test loss")["numbers"]


def test_holms_correction_is_for_what_one_of_several_is_enough_for(tmp_path):
    "A difference that is clear alone and not as one of two or three chances."
    # by 0.0053 [0.0015, 0.0091]
    alone = [0.2930, 0.2950, 0.2960]
    make_study(tmp_path, vamp=dict(test_loss_per_gene=alone), iaf=dict(test_loss_per_gene=0.3))
    judged = tables.verdicts(tables.gather(tmp_path)[0])
    assert of(judged, "The VAMP has a lower test loss")["verdict"] == "holds"
    found = of(judged, "IAF or VAMP, or both")
    assert found["verdict"] == "cannot be told" and found["numbers"].endswith(
        "; not clear after Holm's correction for 2 comparisons"
    )
    # refuted by one of three chances
    refuted = of(judged, "AE has the lowest")
    assert refuted["verdict"] == "cannot be told" and refuted["numbers"].endswith(
        "correction for 3 comparisons"
    )
    make_study(
        tmp_path,
        "colon",
        vamp=dict(test_loss_per_gene=alone),
        iaf=dict(test_loss_per_gene=alone),
        ae=dict(test_loss_per_gene=0.2),
    )
    sure = tables.verdicts(tables.gather(tmp_path)[0])
    # all of three, each at its own level
    assert of(sure, "AE has the lowest", "colon")["verdict"] == "holds"


def test_p_values_and_holm_against_scipy_and_by_hand():
    values = np.array([0.3, 0.1, 0.4, 0.2])
    assert tables.p_value(values) == pytest.approx(stats.ttest_1samp(values, 0).pvalue)
    assert tables.p_value(values, ratio=0.25) > tables.p_value(values)
    low = tables.interval(values, ratio=0.25)[1]
    assert (low > 0) == (tables.p_value(values, ratio=0.25) < 0.05)
    assert (
        np.isnan(tables.p_value([1.0]))
        and tables.p_value([1.0, 1.0]) == 0
        and tables.p_value([0.0, 0.0]) == 1
    )
    assert tables.holm([0.01, np.nan, 0.04, 0.03]) == pytest.approx(
        [0.03, np.nan, 0.06, 0.06], nan_ok=True
    )
    assert tables.holm([0.6, 0.5]).tolist() == [1, 1] and len(tables.holm([])) == 0


# ---- figures and the page


@pytest.fixture
def laid_out(monkeypatch):
    "UMAP is tested with the figures: here the first two units stand in for it."
    monkeypatch.setattr(tables.figures, "umap_coordinates", lambda z: np.asarray(z)[:, :2])


def words(figure):
    return " | ".join(
        t.get_text() for t in figure.findobj(lambda a: hasattr(a, "get_text")) if t.get_text()
    )


def test_figure_1_names_what_is_missing_and_keeps_long_legends_readable(tmp_path, laid_out):
    make_study(make_study(tmp_path, "spleen", 1, models=("vae", "hvamp")), "blood", 1, labels=False)
    make_run(tmp_path, "liver", "vamp", 1, cells=300)
    make_run(tmp_path, "liver", "ae", 0, cells=300)
    names = [f"CD{i}-positive, alpha-beta memory T cell" for i in range(35)]
    for path in (tmp_path / "liver").glob("*/cells.csv"):
        cells = pd.read_csv(path)
        cells.assign(label=np.where(np.arange(300) < 5, "", np.resize(names, 300))).to_csv(
            path, index=False
        )
    figure = tables.figure_1(tables.gather(tmp_path)[0], most=200)
    text = words(figure)
    for said in (
        "blood, seed 0, cell types not known",
        "liver, seed 0, 200 of 300 cells",
        "VAMP (seed 1)",
        "HVAMP",
        "no run",
        "unlabelled",
        names[34],
    ):
        assert said in text, said
    figure.draw_without_rendering()
    for part in figure.subfigs:
        for legend in part.legends:
            box = legend.get_window_extent()
            assert (
                box.width < figure.bbox.width
                and min(t.get_fontsize() for t in legend.get_texts()) >= 7
            )
            # it covers no panel
            assert all(axis.get_window_extent().y0 > box.y1 for axis in part.axes)
    assert figure.get_size_inches()[0] == 9


def test_figure_1_does_not_colour_other_labels_alike(tmp_path, laid_out):
    make_run(tmp_path, "liver", "ae")
    make_run(tmp_path, "liver", "vae", types=4)
    assert "VAE (other labels)" in words(tables.figure_1(tables.gather(tmp_path)[0]))


def test_figure_2_is_of_the_colon_or_the_first(tmp_path):
    runs, _ = tables.gather(make_study(make_study(tmp_path, "blood", 1), "colon-kinchen", 1))
    assert "colon-kinchen, seed 0" in words(tables.figure_2(runs))
    assert "blood, seed 0" in words(tables.figure_2(runs, "blood"))
    assert "blood" in words(tables.figure_2(runs[runs["organ"] == "blood"]))
    with pytest.raises(ValueError, match="'liver' has no runs here; there are blood"):
        tables.figure_2(runs, "liver")


@pytest.mark.slow
def test_the_page_of_a_study(tmp_path, notebooks_here):
    make_study(make_study(tmp_path), "spleen", 1, models=("vae", "vamp", "vampiaf"), labels=False)
    (tmp_path / "liver" / "ae-seed2" / "latent.npy").write_bytes(b"")
    page = tables.make(tmp_path)
    names = {p.name for p in tmp_path.iterdir() if p.is_file() and not p.name.startswith(".")}
    assert names == {
        "tables.ipynb",
        "tables.html",
        "table1.csv",
        "table2.csv",
        "beside_the_paper.csv",
        "verdicts.csv",
        "figure1.png",
        "figure2.png",
    }
    assert page == tmp_path / "tables.html"
    text = page.read_text()
    for said in (
        "ae-seed2",
        "Means over seeds",
        "cannot be told",
        "VAMPIAF",
        "order only",
        "does not apply",
    ):
        assert said in text, said
    one = pd.read_csv(tmp_path / "table1.csv")
    judged = pd.read_csv(tmp_path / "verdicts.csv")
    assert len(one) == 4 + 3 and set(judged["organ"]) == {"over organs", "liver", "spleen"}
    assert len(judged) == 3 * len(tables.CLAIMS) and len(
        pd.read_csv(tmp_path / "beside_the_paper.csv")
    )
    notebook = nbformat.read(tmp_path / "tables.ipynb", 4)
    assert not any(
        o.output_type == "error" for c in notebook.cells if c.cell_type == "code" for o in c.outputs
    )


@pytest.mark.slow
def test_the_notebook_refuses_unknown_parameters(tmp_path):
    with pytest.raises(papermill.PapermillExecutionError) as stop:
        papermill.execute_notebook(
            str(tables.TEMPLATE),
            str(tmp_path / "out.ipynb"),
            {"rnus": str(tmp_path)},
            kernel_name="python3",
            progress_bar=False,
        )
    assert (
        "'rnus' is not known (did you mean 'runs'?); there are runs, organs" in stop.value.evalue
        and "\n" not in stop.value.evalue.strip()
    )


def test_the_template_is_clean():
    notebook = nbformat.read(tables.TEMPLATE, 4)
    assert [c.metadata.get("tags") for c in notebook.cells if c.metadata.get("tags")] == [
        ["parameters"]
    ]
    assert "skip_exec: true" in notebook.cells[0].source


def test_seeds_that_a_claim_would_take_are_those_that_decide_it():
    rng = np.random.default_rng(0)
    for mean, ratio, level in ((0.5, 0.0, 0.95), (1.2, 0.125, 0.975), (-0.8, 0.0, 0.99)):
        found = rng.normal(size=5)
        found = mean + (found - found.mean()) / found.std(ddof=1)
        n = int(tables.seeds_to_decide(found, 0, 0, ratio, level))
        for seeds, verdict in ((n - 1, tables.OPEN), (n, tables.decide([mean] * 2)[0])):
            z = rng.normal(size=seeds)
            same = mean + (z - z.mean()) / z.std(ddof=1)
            assert tables.decide(same, 0, 0, ratio, level)[0] == verdict
    # t * sd * sqrt(ratio) is never undercut
    assert tables.seeds_to_decide([0.5, 1.5], ratio=1.0) == np.inf


def test_metrics_of_the_tables_are_described():
    assert {*tables.IN_TABLE_1, *tables.IN_TABLE_2} <= {*tables.METRICS}
    assert all(isinstance(m, tables.Metric) and m.digits >= 0 for m in tables.METRICS.values())


def test_a_summary_over_seeds():
    values = {name: [np.nan] * 3 for name in (*tables.IN_TABLE_1, *tables.IN_TABLE_2)} | {
        "pcs95": [11.0, 12.0, 13.0]
    }
    runs = pd.DataFrame(
        {
            "organ": "a",
            "title": "A",
            "model": "vae",
            "sampled": False,
            "units": 128,
            "seed": range(3),
            **values,
        }
    )
    row = tables.summarise(runs).set_index("metric").loc["pcs95"]
    # t with two degrees of freedom, sd 1
    half = 4.302653 / np.sqrt(3)
    assert np.allclose(
        [row["mean"], row["low"], row["high"], row["seeds"]], [12, 12 - half, 12 + half, 3]
    )


def test_a_table_as_text_and_as_html():
    table = tables.Html("<table><tr><td>a</td><td>b</td></tr></table>")
    assert table._repr_html_() == str(table) and repr(table) == " | a | b | "


def test_seeds_whose_models_saw_other_test_cells_are_named():
    runs = pd.DataFrame({"seed": [0, 0, 1, 1], "test_cells": ["x", "x", "y", "z"]})
    assert tables.tested_otherwise(runs) == [1]
