"""Which jobs a grid has: zipped keys, tables, equal settings, and sweeps that are extended."""

from inspect import signature
from itertools import product
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra_plugins.race_sweeper import RaceSweeper
from hydra_plugins.sweepers import GridSweeper, OptunaSweeper, RecordedSweeper
from sweeping.planning import Old, Plan, in_order, plan_jobs
from sweeping.recorded import CHOICES, NUMBERS, PLANNED
from sweeping.table import read_table
from sweeping.values import Values

from llm.config import PretrainConfig
from llm.errors import UserError

DEFAULTS = {"seed": "seed=123", "model.n_layers": "model.n_layers=4"}


def plan(
    *typed: str,
    zips: tuple[tuple[str, ...], ...] = (),
    rows: tuple[list[str], ...] = (),
    old: Old | None = None,
) -> Plan:
    overrides = {each.get_key_element(): each for each in OverridesParser.create().parse_overrides([*typed])}
    values = Values(PretrainConfig, lambda choices: None)
    return plan_jobs(overrides, zips, rows, old, values.of, lambda _, __, key: DEFAULTS.get(key))


def test_zipped_keys_count_as_one_beside_the_others() -> None:
    zipped = plan(
        "optimizer.lr=0.1,0.2",
        "seed=1,2",
        "model.emb_dim=32,64",
        "data.batch_size=4,8",
        "model.n_heads=2,4",
        zips=(("optimizer.lr", "model.emb_dim"), ("data.batch_size", "model.n_heads")),
    )
    expected = [
        {
            "optimizer.lr": lr,
            "model.emb_dim": width,
            "seed": seed,
            "data.batch_size": size,
            "model.n_heads": h,
        }
        for (lr, width), seed, (size, h) in product(
            [("0.1", "32"), ("0.2", "64")], ["1", "2"], [("4", "2"), ("8", "4")]
        )
    ]
    assert [dict(each.split("=") for each in job) for job in zipped.jobs] == expected
    assert sorted(zipped.varied) == sorted(expected[0])


@pytest.mark.parametrize(
    ("zips", "line"),
    [
        ((("optimizer.lr", "seed"),), "optimizer.lr has 2, seed has 3"),
        ((("optimizer.lr", "model.n_layers"),), "optimizer.lr has 2, model.n_layers has 1"),
        ((("lr", "seed"),), "lr has no values; given are optimizer.lr, seed"),
        ((("seed",),), "seed is alone"),
        ((("optimizer.lr", "seed"), ("seed", "model.n_layers")), "names seed twice"),
    ],
)
def test_a_zip_that_does_not_close(zips: tuple[tuple[str, ...], ...], line: str) -> None:
    with pytest.raises(UserError, match=line):
        plan("optimizer.lr=1,2", "seed=1,2,3", "model.n_layers=2", zips=zips)


@pytest.mark.parametrize(
    ("typed", "jobs"),
    [
        (["optimizer.lr=1e-3,0.001,1e-2"], 2),
        (["optimizer.lr=1,1.0"], 1),  # a rate
        (["model.tie_weights=true,1,yes,false"], 2),
        (["model.context_length=128,256,128", "seed=1,2"], 4),
        (["optimizer.betas=[0.9,0.95],[0.90,0.950]"], 1),
        (["data.path=a,'a',\"a\",b"], 2),
        (["tokenizer=bpe,bytes,'bpe'"], 2),
        (["seed=1,true"], 2),  # which does not fit, and fails alone
    ],
)
def test_settings_that_are_equal_by_value_are_run_once(typed: list[str], jobs: int) -> None:
    planned = plan(*typed)
    assert len(planned.jobs) == jobs
    asked_for = 1
    for each in OverridesParser.create().parse_overrides(typed):
        asked_for *= len([*each.sweep_string_iterator()])
    assert planned.repeated == asked_for - jobs


def test_an_empty_cell_is_the_default_and_equal_values_are_spelled_alike() -> None:
    rows = (["seed=1", "model.n_layers=4"], ["seed=1"], ["seed=2", "model.n_layers='4'"])
    planned = plan("optimizer.lr=0.5", rows=rows)
    assert planned.jobs == [
        ["seed=1", "model.n_layers=4", "optimizer.lr=0.5"],
        ["seed=2", "model.n_layers=4", "optimizer.lr=0.5"],
    ]
    assert planned.varied == ["seed"]
    with pytest.raises(UserError, match="seed is in the table and on the command line"):
        plan("seed=1", rows=rows)


OLD = Old([[f"optimizer.lr={lr}", f"seed={seed}"] for lr in (0.1, 0.2) for seed in (1, 2)], ["seed"])


@pytest.mark.parametrize(
    ("typed", "added", "there"),
    [
        (["seed=3,4"], [["0.1", "3"], ["0.1", "4"], ["0.2", "3"], ["0.2", "4"]], 0),
        (["seed=2,3"], [["0.1", "3"], ["0.2", "3"]], 2),
        (["optimizer.lr=0.3,1e-1"], [["0.3", "1"], ["0.3", "2"]], 2),
        (["optimizer.lr=0.3", "seed=1,7"], [["0.3", "1"], ["0.3", "7"]], 0),
        (["model.n_layers=4,5"], [[*job, "5"] for job in product(["0.1", "0.2"], ["1", "2"])], 4),
    ],
)
def test_a_sweep_is_extended_by_what_it_has_not(typed: list[str], added: list[list[str]], there: int) -> None:
    planned = plan(*typed, old=OLD)
    assert planned.jobs[:4] == OLD.jobs
    given = [dict(each.split("=") for each in job) for job in planned.jobs[4:]]
    keys = ("optimizer.lr", "seed", "model.n_layers")
    assert [[job[key] for key in keys if key in job] for job in given] == [[*job] for job in added]
    assert planned.repeated == there
    assert ("model.n_layers" in planned.varied) == (len(added[0]) == 3)


def test_every_setting_has_its_first_seed_before_any_has_its_second() -> None:
    jobs = plan("optimizer.lr=0.1,0.2", "seed=1,2,3").jobs
    assert in_order(range(6), jobs, "seeds_last") == [0, 3, 1, 4, 2, 5]
    assert in_order([1, 2, 3, 5], jobs, "seeds_last") == [3, 1, 2, 5]  # resumed
    assert in_order(range(6), jobs, "given") == [*range(6)]


def test_a_table_in_csv_and_in_json(tmp_path: Path) -> None:
    table = tmp_path / "settings.csv"
    table.write_bytes(
        b"\xef\xbb\xbfoptimizer.lr, data.path ,optimizer.betas,model\r\n"
        b'1e-3,"a, ${oc.env:HOME}\'s","[0.9,0.95]",tiny\r\n'
        b"\r\n,null,,\r\n"
    )
    expected = [
        [
            "optimizer.lr=1e-3",
            r"data.path='a, \${oc.env:HOME}\'s'",
            "optimizer.betas=[0.9,0.95]",
            "model=tiny",
        ],
        ["data.path=null"],
    ]
    assert read_table(table, PretrainConfig) == expected
    lines = tmp_path / "settings.jsonl"
    lines.write_text(
        '{"optimizer.lr": "1e-3", "data.path": "a, ${oc.env:HOME}\'s", "optimizer.betas": [0.9, 0.95], '
        '"model": "tiny"}\n\n{"data.path": null}\n',
        "utf-8",
    )
    assert read_table(lines, PretrainConfig) == expected


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("hydra.run.dir\nx", "hydra.run.dir is not a key of jobs"),
        ("hydra/launcher\njoblib", "hydra/launcher is not a key of jobs"),
        ("sweep.extend\nx", "sweep.extend is not a key of jobs"),
        ("resume\nx", "resume is for a single run"),
        ("optimizer.lrr\n1", r"did you mean optimizer\.lr\?"),
        ("+new.key\n1", r"\+new\.key: there is no such key"),
        ("optimizer.lr\n${oc.env:HOME}", "line 2: .* nothing in it is resolved"),
        ("optimizer.lr\n\n${seed}", "line 3: .* nothing in it is resolved"),
        ("model\n../../secret", "line 2: .* the name of an option"),
        ("model\n'${oc.env:HOME}'", "line 2: .* the name of an option"),
        ('optimizer.lr\n"1,2"', "a cell holds one value"),
        ("seed\nrange(3)", "a cell holds one value"),
        ("seed\n[1", "not a value"),
        ("seed,seed\n1,2", "names 'seed' twice"),
        ("seed,optimizer.lr\n1", "line 2: 1 cells, but the head names 2 keys"),
        ("seed", "has no rows"),
        ("", "has no rows"),
        ("seed\n\udcff", "must be UTF-8"),
    ],
)
def test_a_table_of_somebody_else_can_do_no_more_than_set_keys(
    tmp_path: Path, content: str, line: str
) -> None:
    (tmp_path / "a.csv").write_text(content, "utf-8", errors="surrogateescape")
    with pytest.raises(UserError, match=line) as raised:
        read_table(tmp_path / "a.csv", PretrainConfig)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("sweeper", [GridSweeper, OptunaSweeper, RaceSweeper])
def test_a_sweep_is_resumed_with_all_settings_of_its_sweeper(sweeper: type[RecordedSweeper]) -> None:
    settings = {f"hydra.sweeper.{name}" for name in signature(sweeper).parameters} - {"hydra.sweeper.params"}
    assert settings <= {*CHOICES, *NUMBERS, *PLANNED}  # else a new one would be forgotten
