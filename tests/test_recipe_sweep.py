"""The sweep as its user meets it: tables, dry runs, skipped and redone runs, failures, two at a time, submitit."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import sweep
import timm
import yaml
from sweeping import grid as grids
from sweeping import jobs, run_state
from training import settings

from rblock_fx import apply_rblock, describe
from tests.recipe_folders import CONFIG, write_run, write_table

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes"


TABLES = sorted(path.stem for path in (RECIPES / "tables").glob("*.yaml"))
PAPER = {
    "table1": (4, 7, 22 + 2), "table2": (1, 5, 5), "table3": (1, 9, 30),
    "table1_smoke": (2, 7, 24), "table2_smoke": (1, 5, 5), "table3_smoke": (1, 9, 30),
}  # columns, rows, numbers of the paper  # fmt: skip


def options(table: object, *words: str) -> sweep.Options:
    return sweep.read_options([str(table), *words])


def runs_of(table: object, *words: str) -> list[grids.Run]:
    asked = options(table, *words)
    return grids.grid_runs(sweep.asked_grid(asked), asked.extra)


def finish(run: grids.Run, config: dict | None = None) -> dict:
    return write_run(run.folder, config or grids.plain(run.config), [50.0, 70.0, 90.0, 80.0])


def stand_in(tmp_path: Path, monkeypatch, body: str) -> None:
    """Let the sweep start this script instead of train.py; it finds its settings in `args`, and a finish()."""
    script = tmp_path / "train.py"
    script.write_text(
        "import json, os, sys, time, pathlib, types\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from tests.recipe_folders import write_run\n"
        "settings = json.loads(sys.argv[1])\n"
        "args, folder = types.SimpleNamespace(**settings), pathlib.Path(settings['output_dir'])\n"
        "def finish():\n    write_run(folder, settings | {'resume': None}, [10.0, 20.0, 30.0, 40.0])\n" + body
    )
    monkeypatch.setattr(
        sweep, "command_of", lambda run, _: [sys.executable, str(script), json.dumps(grids.plain(run.config))]
    )


# --- tables ----------------------------------------------------------------------------------------------------------


def test_every_table_is_there():
    assert len(TABLES) == 13
    ablations = {"alpha", "temperature", "drop_prob", "block_size", "sites", "architectures"}
    assert set(TABLES) == set(PAPER) | {f"ablation_{name}" for name in ablations} | {"equal_cost"}


@pytest.mark.parametrize("table", TABLES)
def test_every_table_validates_into_runs(table):
    grid = grids.read_grid(grids.find_table(table))
    runs = grids.grid_runs(grid, [])
    assert len(runs) == len(grid.columns) * len(grid.rows) * len(grid.seeds) > 0
    assert len({run.folder for run in runs}) == len(runs)
    assert len({json.dumps(grids.plain(run.config) | {"output_dir": ""}) for run in runs}) == len(runs)  # none twice
    assert {run.config.method for run in runs} >= {"none", "dropblock"}
    assert grid.output_dir == f"runs/{table}"
    assert [row.baseline for row in grid.rows].count(True) == [row.compare for row in grid.rows].count(True) == 1
    text = grids.find_table(table).read_text()
    assert text.startswith("# ")
    assert f"python recipes/sweep.py {table}" in text
    assert "--report" in text


@pytest.mark.parametrize("table", PAPER)
def test_the_papers_tables_have_the_papers_rows_and_numbers(table):
    grid = grids.read_grid(grids.find_table(table))
    columns, rows, numbers = PAPER[table]
    values = [value for row in grid.rows for value in row.paper.values()]
    assert (len(grid.columns), len(grid.rows)) == (columns, rows)
    assert sum(len(value) if isinstance(value, list) else 1 for value in values) == numbers
    by_name = {row.name: row for row in grid.rows}
    if table.startswith("table1"):
        assert by_name["BDropDML"].paper["cifar100-resnet18"] == 72.35
        assert by_name["SDropDML"].paper["cifar10-vgg16"] == 94.21
        assert by_name["Dropout"].set == {"method": "dropout", "drop_prob": 0.5, "sites": "head"}
    if table.startswith("table2"):
        assert all(row.set["drop_schedule"] == "linear" for row in grid.rows if not row.baseline)
    if table.startswith("table3"):
        assert by_name["R-Drop"].paper["cifar100-resnet18"] == [54.93, 68.88, 68.99, 70.81, 71.17]


def test_a_table_can_be_run_on_another_config():
    runs = runs_of(
        "ablation_alpha", "--config", CONFIG, "--seeds", "[3]", "--output_dir", "runs/x", "--", "--lr", "0.2"
    )
    assert {run.column for run in runs} == {"digits"}
    assert {run.config.dataset for run in runs} == {"digits"}
    assert {(run.config.seed, run.config.lr) for run in runs} == {(3, 0.2)}
    assert sorted({run.config.alpha for run in runs if run.row.startswith("BDropDML")}) == [0, 0.05, 0.1, 0.3, 0.5, 0.9]
    assert runs[0].folder == Path("runs/x/digits/plain/seed0".replace("seed0", "seed3"))


BAD = [
    ({"sedes": [0]}, r"sedes"),
    ({"title": None}, r"title"),
    ({"seeds": []}, r"seeds is \[\]; expected different numbers from 0"),
    ({"seeds": [1, 1]}, r"seeds is \[1, 1\]"),
    ({"stages": [1.0, 0.5]}, r"stages is \[1\.0, 0\.5\]; expected rising shares"),
    ({"stages": []}, r"row BDropDML: paper\[digits\] is \[50\.0, 60\.0\]; expected one number"),
    ({"stages": [1.0]}, r"expected a list of 1, one per stage"),
    ({"columns": []}, r"columns is empty"),
    ({"rows": []}, r"rows is empty"),
    ({"columns": [{"name": "a/b", "config": CONFIG}]}, r"'a/b' is no folder name"),
    ({"columns": [{"name": "a", "config": CONFIG}, {"name": "A", "config": CONFIG}]}, r"name 'a' stands there twice"),
    ({"columns": [{"name": "a", "config": CONFIG, "set": {"seed": 1}}]}, r"set has seed, which the sweep itself sets"),
    (
        {"rows": [{"name": "a", "baseline": True}, {"name": "b", "baseline": True}]},
        r"rows a, b all have baseline: true",
    ),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[next(iter(c)) + str(i) for i, (c, _) in enumerate(BAD)])
def test_a_wrong_table_is_told(tmp_path, changes, message):
    path = write_table(tmp_path / "t.yaml", **changes)
    with pytest.raises(settings.RecipeError, match=rf"table .*t\.yaml.*{message}"):
        grids.read_grid(path)


def test_wrong_settings_are_told_all_at_once_and_nothing_starts(tmp_path):
    rows = [
        {"name": "plain", "set": {"method": "none"}},
        {"name": "typo", "set": {"metod": "none"}},
        {"name": "range", "set": {"drop_prob": 2}},
    ]
    columns = [{"name": "digits", "config": CONFIG}, {"name": "gone", "config": "configs/gone.yaml"}]
    path = write_table(tmp_path / "t.yaml", rows=rows, columns=columns, stages=[])
    with pytest.raises(
        settings.RecipeError, match=r"5 cells .*digits/typo: .*metod.*digits/range: drop_prob.*gone/plain"
    ):
        sweep.sweep(options(path))
    assert list(tmp_path.iterdir()) == [path]


def test_wrong_options_are_told():
    with pytest.raises(settings.RecipeError, match=r"no table 'table3_smok'.*did you mean table3_smoke"):
        sweep.sweep(options("table3_smok"))
    with pytest.raises(settings.RecipeError, match=r"jobs is 0; expected at least 1, e\.g\. --jobs 1"):
        options("table3", "--jobs", "0")
    with pytest.raises(settings.RecipeError, match=r"--job 1; did you mean jobs\? `python recipes/sweep\.py --help`"):
        options("table3", "--job", "1")
    with pytest.raises(settings.RecipeError, match=r"cluster_options without a cluster"):
        options("table3", "--cluster_options", "{timeout_min: 1}")
    with pytest.raises(settings.RecipeError, match=r"--seed is set by the sweep"):
        runs_of("table3_smoke", "--", "--seed", "1")


def test_a_mistake_is_one_line_and_exit_code_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sweep.py", "nothing"])
    with pytest.raises(SystemExit) as exit_:
        sweep.main()
    assert exit_.value.code == 2
    assert re.fullmatch(r"error: no table 'nothing'.*\n", capsys.readouterr().err)


# --- dry run and states ----------------------------------------------------------------------------------------------


def test_dry_run_lists_commands_that_can_be_pasted(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = write_table(tmp_path / "t.yaml", output_dir=str(tmp_path / "a folder"))
    runs = runs_of(path)
    finish(runs[0])
    finish(runs[1])
    (runs[1].folder / "result.json").write_text("{")
    (runs[2].folder / "checkpoint").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    assert sweep.sweep(options(path, "--dry_run")) == 0
    assert sorted(tmp_path.rglob("*")) == before
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12
    states = [line.split("  # ")[1] for line in lines]
    assert states[0] == "done"
    assert states[1].startswith("broken: ")
    assert states[2:4] == ["to resume", "to do"]
    for line, run in zip(lines, runs, strict=True):
        words = shlex.split(line, comments=True)
        assert words[1:6] == ["-m", "accelerate.commands.launch", "--quiet", "--num_processes", "1"]
        assert words[6] == "recipes/train.py"
        assert settings.read_config(words[7:]) == settings.read_config([*run.options, "--resume", "auto"])


def test_more_processes_are_launched_on_a_free_port():
    command = sweep.command_of(runs_of("table3_smoke")[0], 2)
    assert command[3:][:6] == ["--quiet", "--num_processes", "2", "--multi_gpu", "--main_process_port", "0"]


BROKEN = {
    "truncated": lambda text: text[: len(text) // 2],
    "empty": lambda _: "",
    "no mapping": lambda _: "[]",
    "a key gone": lambda text: text.replace('"top1_last"', '"top1"'),
    "no number": lambda text: re.sub(r'"top1_best": [\d.]+', '"top1_best": NaN', text),
    "a string": lambda text: re.sub(r'"wall_time_seconds": [\d.]+', '"wall_time_seconds": "2"', text),
    "no config": lambda text: re.sub(r'"config": \{.*?\}, "versions"', '"config": 1, "versions"', text),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_a_broken_result_is_no_result(tmp_path, damage):
    run = runs_of(write_table(tmp_path / "t.yaml"))[0]
    finish(run)
    assert run_state.look(run.folder, grids.plain(run.config)).state == "done"
    file = run.folder / "result.json"
    text = BROKEN[damage](file.read_text())
    assert text != file.read_text()
    file.write_text(text)
    found = run_state.look(run.folder, grids.plain(run.config))
    assert (found.state, found.result) == ("broken", None)
    assert found.why


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "metrics.csv").unlink(), "metrics.csv has 0 rows and result.json says 4 epochs"),
        (lambda folder: (folder / "metrics.csv").write_text("epoch,test_top1\n1,abc\n"), "metrics.csv: .*abc"),
        (lambda folder: edit(folder / "result.json", top1_best=99.0), "says top1_best 99.0 and metrics.csv 90.0"),
        (lambda folder: edit(folder / "result.json", top1_last=99.0), "says top1_last 99.0 and metrics.csv 80.0"),
    ],
)
def test_a_result_that_its_metrics_do_not_bear_out_is_broken(tmp_path, damage, message):
    run = runs_of(write_table(tmp_path / "t.yaml"))[0]
    finish(run)
    assert run_state.look(run.folder, grids.plain(run.config)).state == "done"
    damage(run.folder)
    found = run_state.look(run.folder, grids.plain(run.config))
    assert (found.state, found.result) == ("broken", None)
    assert re.search(message, found.why), found.why


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_unreadable_config_is_broken(tmp_path):
    run = runs_of(write_table(tmp_path / "t.yaml"))[0]
    run.folder.mkdir(parents=True)
    (run.folder / "config.yaml").write_text("epochs: [")
    assert run_state.look(run.folder, grids.plain(run.config)).state == "broken"


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_of_other_settings_is_refused(tmp_path, finished):
    path = write_table(tmp_path / "t.yaml")
    run = runs_of(path)[4]
    if finished:
        finish(run, config=grids.plain(run.config) | {"lr": 0.7})
    else:
        run.folder.mkdir(parents=True)
        other = settings.Config(**(asdict(run.config) | {"lr": 0.7}))
        (run.folder / "config.yaml").write_text(settings.to_yaml(other))
    with pytest.raises(
        settings.RecipeError,
        match=rf"{re.escape(str(run.folder))} holds a run of other settings: lr \(there 0\.7, asked 0\.05",
    ):
        sweep.sweep(options(path))


def test_settings_of_no_consequence_may_differ_and_new_ones_have_their_default(tmp_path):
    run = runs_of(write_table(tmp_path / "t.yaml"))[0]
    config = grids.plain(run.config) | {"num_workers": 3, "output_dir": "elsewhere", "resume": None}
    config.pop("ema_decay")  # a run of before this setting was there
    finish(run, config=config)
    assert run_state.look(run.folder, grids.plain(run.config)).state == "done"


def test_a_sweep_may_grow_and_not_change(tmp_path, monkeypatch, capsys):
    stand_in(tmp_path, monkeypatch, "finish()\n")
    path = write_table(tmp_path / "t.yaml")
    assert sweep.sweep(options(path, "--seeds", "[0]")) == 0
    assert sweep.sweep(options(path, "--seeds", "[0,1]")) == 0
    assert capsys.readouterr().out.count("skipped, done before") == 4
    with pytest.raises(
        settings.RecipeError, match=r"does not contain: seed 0\. .*go on with that one: python .*sweep\.py"
    ):
        sweep.sweep(options(path, "--seeds", "[1,2]"))
    table = yaml.safe_load(path.read_text())
    with pytest.raises(settings.RecipeError, match=r"does not contain: digits/C-DropBlock"):
        sweep.sweep(options(write_table(path, rows=table["rows"][:3]), "--seeds", "[0,1]"))
    (tmp_path / "t" / "sweep.yaml").write_text("grid: [")
    with pytest.raises(settings.RecipeError, match=r"sweep\.yaml cannot be read .*mv "):
        sweep.sweep(options(write_table(path), "--seeds", "[0,1]"))


def test_a_sweep_of_other_settings_is_refused_though_no_run_is_there(tmp_path):
    path = write_table(tmp_path / "t.yaml")
    asked = options(path, "--", "--lr", "0.3")
    grid = sweep.asked_grid(asked)
    record = sweep.sweep_record(grid, grids.grid_runs(grid, asked.extra), asked)
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "sweep.yaml").write_text(yaml.safe_dump(record))
    with pytest.raises(settings.RecipeError, match=r"digits/plain with other settings: lr \(there 0\.3, asked 0\.05\)"):
        sweep.sweep(options(path))


def test_an_unwritable_folder_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(settings.RecipeError, match=r"cannot write to output_dir .*file/runs"):
        sweep.sweep(options(write_table(tmp_path / "t.yaml", output_dir=str(tmp_path / "file" / "runs"))))


# --- runs ------------------------------------------------------------------------------------------------------------


def test_one_failing_run_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    stand_in(
        tmp_path,
        monkeypatch,
        "if args.seed == 1 and args.method == 'none': sys.exit('error: the disk is full')\nfinish()\n",
    )
    path = write_table(tmp_path / "t.yaml")
    assert sweep.sweep(options(path, "--jobs", "2")) == 1
    printed = capsys.readouterr()
    assert len(list((tmp_path / "t").rglob("result.json"))) == 11
    assert re.search(r"digits/plain/seed1 +failed", printed.out)
    assert "digits/plain/seed1: error: the disk is full (log: " in printed.err
    log = tmp_path / "t" / "digits" / "plain" / "seed1.log"
    assert "the disk is full" in log.read_text()
    stand_in(tmp_path, monkeypatch, "assert (args.seed, args.method) == (1, 'none')\nfinish()\n")
    assert sweep.sweep(options(path)) == 0  # only the failed one is started


def test_jobs_run_side_by_side_and_share_the_cores(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    meet = "marks = folder.parent.parent\nfolder.mkdir(parents=True)\n"
    meet += "while len(list(marks.glob('*/seed0'))) < 2: time.sleep(0.02)\n"  # alone, it would wait for ever
    meet += "folder.rmdir(); finish(); (folder / 'threads').write_text(os.environ['OMP_NUM_THREADS'])\n"
    stand_in(tmp_path, monkeypatch, meet)
    rows = [{"name": name, "set": {"method": name}} for name in ("none", "dropblock")]
    path = write_table(tmp_path / "t.yaml", rows=rows, stages=[])
    assert sweep.sweep(options(path, "--jobs", "2", "--seeds", "[0]")) == 0
    expected = str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert [file.read_text() for file in tmp_path.rglob("threads")] == [expected] * 2


def test_an_unusable_folder_is_set_aside_once_and_kept(tmp_path, monkeypatch, capsys):
    stand_in(
        tmp_path,
        monkeypatch,
        "if folder.exists(): sys.exit(f'error: resume: {folder}/checkpoint cannot be read')\nfinish()\n",
    )
    path = write_table(tmp_path / "t.yaml")
    run = runs_of(path)[0]
    (run.folder / "checkpoint").mkdir(parents=True)
    (run.folder / "checkpoint" / "state.json").write_text("precious")
    run.folder.with_name("seed0.unusable1").mkdir()  # of an earlier time
    assert sweep.sweep(options(path, "--seeds", "[0]")) == 0
    kept = run.folder.with_name("seed0.unusable2")
    assert (kept / "checkpoint" / "state.json").read_text() == "precious"
    assert "what lay there is in seed0.unusable2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "unusable"),
    [
        ("error: resume: runs/x/checkpoint cannot be read: EOFError", True),
        ("error: (process 1) resume: runs/x/checkpoint is no complete checkpoint", True),
        ("error: output_dir runs/x holds results (metrics.csv) and no checkpoint to continue from", True),
        ("error: data_dir /data holds no such file", False),
        ("RuntimeError: out of memory", False),
    ],
)
def test_only_an_unusable_folder_is_set_aside(line, unusable):
    assert bool(jobs.UNUSABLE.match(line)) is unusable


def test_an_exit_without_a_result_is_a_failure(tmp_path, monkeypatch, capsys):
    stand_in(tmp_path, monkeypatch, "print('all is well')\n")
    assert sweep.sweep(options(write_table(tmp_path / "t.yaml"), "--seeds", "[0]")) == 1
    assert capsys.readouterr().err.count("all is well") == 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_ctrl_c_lets_the_runs_save(tmp_path, number):
    """The real command in a process of its own; SIGINT reaches the training process, which writes and ends."""
    path = write_table(tmp_path / "t.yaml")
    folder = tmp_path / "t" / "digits" / "plain" / "seed0"
    script = tmp_path / "train.py"
    script.write_text(
        "import pathlib, sys, time\n"
        f"folder = pathlib.Path({str(folder)!r})\n"
        "folder.mkdir(parents=True)\n(folder / 'started').touch()\n"
        "try:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n"
        "    time.sleep(0.5)\n    (folder / 'checkpoint').mkdir()\n"
    )
    starter = tmp_path / "start.py"
    launch = [sys.executable, "-c", "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))"]
    starter.write_text(
        f"import sys\nsys.path[:0] = [{str(RECIPES)!r}, {str(ROOT)!r}]\nimport sweep\n"
        f"sweep.command_of = lambda run, _: [*{launch!r}, {sys.executable!r}, {str(script)!r}]\nsweep.main()\n"
    )
    process = subprocess.Popen(
        ["sh", "-c", "trap '' INT; exec \"$@\"", "sh", sys.executable, str(starter), str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    deadline = time.monotonic() + 60
    while not (folder / "started").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (folder / "checkpoint").is_dir()  # it was given the time to save
    assert re.search(r"digits/plain/seed0 +stopped, to resume", out)
    assert out.count("not started") == 11
    assert "the same command goes on from here" in err


def test_submitit_runs_each_command_as_a_job(tmp_path, monkeypatch, capsys):
    stand_in(tmp_path, monkeypatch, "if args.method == 'dropblock': sys.exit('error: no such data')\nfinish()\n")
    path = write_table(tmp_path / "t.yaml")
    words = ("--seeds", "[0]", "--cluster", "local", "--cluster_options", "{timeout_min: 3}", "--jobs", "2")
    assert sweep.sweep(options(path, *words)) == 1
    printed = capsys.readouterr()
    assert len(list((tmp_path / "t").rglob("result.json"))) == 3
    assert (
        len(list((tmp_path / "t" / "submitit").glob("*_submission.sh")))
        + len(list((tmp_path / "t" / "submitit").glob("*_submitted.pkl")))
        >= 4
    )
    assert "digits/DropBlock/seed0: error: no such data (log: " in printed.err


def test_what_submitit_does_not_take_is_told(tmp_path, monkeypatch):
    path = write_table(tmp_path / "t.yaml")
    with pytest.raises(settings.RecipeError, match=r"cluster local with .*no_such"):
        sweep.sweep(options(path, "--cluster", "local", "--cluster_options", "{no_such: 1}"))
    monkeypatch.setitem(sys.modules, "submitit", None)  # as if it were not installed
    with pytest.raises(settings.RecipeError, match=r"pip install 'rblock-fx\[slurm\]'"):
        sweep.sweep(options(path, "--cluster", "local"))


def test_the_other_architectures_carry_masks_on_maps_that_have_blocks():
    grid = grids.read_grid(grids.find_table("ablation_architectures"))
    shape = (3, 32, 32)
    for column in grid.columns:
        model = timm.create_model(column.set["model"], num_classes=100, in_chans=3, **column.set["model_kwargs"])
        apply_rblock(model, method="sdropdml", drop_prob=0.2, block_size=3, input_size=shape)
        maps = re.findall(r"\d+x(\d+)x(\d+) ", str(describe(model)).split("---\n")[1])
        assert maps == [("4", "4")] * 2
    assert len(grid.columns) == 5
