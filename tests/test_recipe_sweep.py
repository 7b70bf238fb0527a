"""The sweep as its user meets it: tables, costs, dry runs, states of folders, failures, GPUs, Ctrl-C, submitit."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import findings
import numpy as np
import pytest
import study
import sweep
import timm
import torch
import yaml
from filelock import FileLock
from settings import RecipeError
from torch.utils.flop_counter import FlopCounterMode

from rblock_fx import apply_rblock, describe
from tests.recipe_folders import CONFIG, write_run, write_table

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes"
TABLES = sorted(path.stem for path in (RECIPES / "tables").glob("*.yaml"))
PAPER = {"table1": (4, 24), "table2": (1, 5), "table3": (1, 30)}  # columns, numbers of the paper
SMOKE = {"table1_smoke": (2, 7, 2), "table2_smoke": (1, 5, 2), "table3_smoke": (1, 9, 3)}  # columns, rows, seeds


def options(table, *words):
    return sweep.read_options([str(table), *words])


def runs_of(table, *words):
    asked = options(table, *words)
    return study.plan_runs(sweep.requested_table(asked), asked.extra, asked.num_processes)


def finish(run, **changes):
    write_run(run.folder, run.settings | changes, [50.0, 70.0, 90.0, 80.0])


def stand_in(tmp_path, monkeypatch, body):
    """Let the sweep start this script in place of train.py; it has its settings in `args`, and a finish()."""
    script = tmp_path / "train.py"
    script.write_text(
        "import json, os, sys, time, pathlib, types\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from tests.recipe_folders import write_run\n"
        "settings = json.loads(sys.argv[1])\n"
        "args, folder = types.SimpleNamespace(**settings), pathlib.Path(settings['output_dir'])\n"
        "def finish():\n    write_run(folder, settings, [10.0, 20.0, 30.0, 40.0])\n" + body
    )
    monkeypatch.setattr(sweep, "command_of", lambda run: [sys.executable, str(script), json.dumps(run.settings)])


# --- tables ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLES)
def test_every_table_plans_its_runs(name):
    table, runs = study.read_table(name), runs_of(name)
    assert len(runs) == len(table.columns) * len(table.rows) * len(table.seeds) > 0
    assert len({run.folder for run in runs}) == len(runs)
    assert len({json.dumps(run.settings | {"output_dir": ""}) for run in runs}) == len(runs)  # none twice
    assert any(row.against for row in table.rows)
    assert table.output_dir == f"runs/{name}"
    assert f"python recipes/sweep.py {name}" in (RECIPES / "tables" / f"{name}.yaml").read_text()


def test_full_tables_have_their_seeds_and_controls():
    full = [name for name in TABLES if name not in SMOKE]
    assert len(full) == 10
    for name in full:
        table = study.read_table(name)
        rows = {row.name: row for row in table.rows}
        assert len(table.seeds) == (10 if name in PAPER else 5)
        assert (rows["plain-lr1.8"].set, rows["plain-lr1.8"].times) == ({"method": "none"}, {"lr": 1.8})
        assert rows["pair-p0"].set["drop_prob"] == 0
    for name, shape in SMOKE.items():
        table = study.read_table(name)
        assert (len(table.columns), len(table.rows), len(table.seeds)) == shape


def test_the_papers_tables_have_the_papers_numbers():
    for name, (columns, numbers) in PAPER.items():
        for table in (study.read_table(name), study.read_table(f"{name}_smoke")):
            assert sum(np.size(value) for row in table.rows for value in row.paper.values()) == numbers
        assert len(study.read_table(name).columns) == columns
    rows = {row.name: row for row in study.read_table("table1").rows}
    assert rows["BDropDML"].paper["cifar100-resnet18"] == 72.35


def test_complementary_is_compared_with_random():
    rows = {row.name: row.against for row in study.read_table("table3").rows}
    assert "R-DropBlock" in rows["BDropDML"]
    assert rows["C-Drop"] == ["R-Drop"]
    alphas = {row.name: row.against for row in study.read_table("ablation_alpha").rows}
    assert "BDropDML-alpha0" in alphas["BDropDML-alpha0.1"]


def test_equal_cost_is_computed_from_the_model():
    """Against torch's own count of the operations in one training forward."""
    settings = {run.row: run.settings for run in runs_of("equal_cost", "--seeds", "[0]")}
    model = timm.create_model("resnet18", num_classes=100)
    model.conv1, model.maxpool = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False), torch.nn.Identity()
    images, counts = torch.zeros(2, 3, 32, 32), []
    for converted in (False, True):
        if converted:
            apply_rblock(model, ["layer3", "layer4"], input_size=(3, 32, 32))
        with FlopCounterMode(display=False) as counter:
            model(images)
        counts.append(counter.get_total_flops())
    ratio = counts[1] / counts[0]
    for row in ("plain-equal-cost", "DropBlock-equal-cost"):
        assert settings[row]["epochs"] == round(200 * ratio) == 248
        assert settings[row]["milestones"] == [round(epoch * ratio) for epoch in (75, 130, 180)]
    assert (settings["plain-2x"]["epochs"], settings["plain-2x"]["milestones"]) == (400, [150, 260, 360])


def test_factors_multiply_what_the_command_line_gives():
    runs = runs_of("table3", "--seeds", "[0]", "--", "--lr", "0.2", "--epochs", "20", "--milestones", "[8]")
    assert {run.row: run.settings["lr"] for run in runs}["plain-lr1.8"] == pytest.approx(0.36)
    short = runs_of("equal_cost", "--seeds", "[0]", "--", "--epochs", "20", "--milestones", "[8]")
    assert {run.row: run.settings["epochs"] for run in short}["plain-equal-cost"] == 25
    with pytest.raises(RecipeError, match="times: dataset is 'digits', which is not a number"):
        study.multiply({"dataset": "digits"}, {"dataset": 2})


def test_a_table_runs_on_another_config():
    words = ("--config", CONFIG, "--seeds", "[3]", "--output_dir", "runs/x")
    runs = runs_of("ablation_alpha", *words)
    assert {(run.column, run.settings["dataset"], run.seed) for run in runs} == {("digits", "digits", 3)}
    assert runs[0].folder == Path("runs/x/digits/plain/seed3")


def test_architectures_are_masked_where_blocks_fit():
    columns = study.read_table("ablation_architectures").columns
    assert len(columns) == 5
    for column in columns:
        model = timm.create_model(column.set["model"], num_classes=100, **column.set["model_kwargs"])
        apply_rblock(model, method="sdropdml", block_size=3, input_size=(3, 32, 32))
        assert [tuple(site.shape[-2:]) for site in describe(model).sites] == [(4, 4)] * 2


ROW = {"name": "a", "set": {"method": "none"}}
BAD = [
    ({"sedes": [0]}, r"sedes"),
    ({"seeds": []}, r"seeds is empty"),
    ({"seeds": [1, 1]}, r"seeds is \[1, 1\] .*expected different seeds"),
    ({"seeds": [-1]}, r"seeds.*-1"),
    ({"stages": [1.0, 0.5]}, r"stages is \[1\.0, 0\.5\]; expected .*rising stages"),
    ({"stages": []}, r"row BDropDML: paper\[digits\] is \[50\.0, 60\.0\]; expected one number"),
    ({"stages": [1.0]}, r"with stages one per stage"),
    ({"measures": []}, r"measures is empty"),
    ({"columns": []}, r"columns is empty"),
    ({"columns": [{"name": "a/b", "config": CONFIG}]}, r"a/b does not match"),
    ({"rows": [ROW, ROW | {"name": "A"}]}, r"the name 'A' occurs twice"),
    ({"rows": [{"name": "a", "set": {"seed": 1}}]}, r"set has seed, which the sweep sets"),
    ({"rows": [ROW | {"against": ["b"]}]}, r"row a names 'b'; expected another row"),
    ({"rows": [ROW | {"equal_cost": "a"}]}, r"row a names 'a'; expected another row"),
    (
        {"rows": [ROW | {"equal_cost": "b"}, ROW | {"name": "b", "equal_cost": "a"}]},
        r"equal_cost names b, which has equal_cost itself",
    ),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[next(iter(c)) + str(i) for i, (c, _) in enumerate(BAD)])
def test_a_wrong_table_is_refused(tmp_path, changes, message):
    with pytest.raises(RecipeError, match=rf"table .*t\.yaml.*{message}"):
        study.read_table(str(write_table(tmp_path / "t.yaml", **changes)))


def test_wrong_settings_are_listed_and_nothing_starts(tmp_path):
    rows = [ROW, {"name": "typo", "set": {"metod": "none"}}, {"name": "range", "set": {"alpha": 2}}]
    columns = [{"name": "digits", "config": CONFIG}, {"name": "gone", "config": "configs/gone.yaml"}]
    path = write_table(tmp_path / "t.yaml", rows=rows, columns=columns, stages=[])
    with pytest.raises(RecipeError, match=r"5 cells .*digits/typo: .*metod.*digits/range: .*alpha.*gone/a"):
        sweep.sweep(options(path))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("table3_smok",), r"no table 'table3_smok'; .*table3_smoke"),
        (("table3", "--jobs", "0"), r"jobs.*0"),
        (("table3", "--job", "1"), r"--job 1; python recipes/sweep\.py --help"),
        (("table3", "--cluster_options", "{timeout_min: 1}"), r"--cluster_options needs a cluster"),
        (("table3_smoke", "--", "--seed", "1"), r"--seed is set by the sweep"),
    ],
)
def test_a_wrong_option_is_one_line_and_exit_status_2(words, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sweep.py", *words])
    with pytest.raises(SystemExit) as ending:
        sweep.main()
    assert ending.value.code == 2
    assert re.fullmatch(rf"error: .*{message}.*\n", capsys.readouterr().err)


# --- dry runs and the states of folders ------------------------------------------------------------------------------


def test_a_dry_run_lists_commands_that_can_be_pasted(tmp_path, capsys, monkeypatch):
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
    states = [line.split("  # ")[1].split(":")[0] for line in lines]
    assert states == ["done", "broken", "to resume", *["to do"] * 9]
    for line, run in zip(lines, runs, strict=True):
        words = shlex.split(line, comments=True)
        assert words[1:7] == ["-m", "accelerate.commands.launch", "--quiet", "--num_processes", "1", "recipes/train.py"]
        assert study.check_settings_of_run(words[7:-2]) | {"num_processes": 1} == run.settings


def test_a_dry_run_ends_quietly_in_head():
    command = f"{sys.executable} recipes/sweep.py table3 --seeds '{list(range(60))}' --dry_run | head -1"
    done = subprocess.run(
        ["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"], cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (128 + signal.SIGPIPE, "", 1)


def test_more_processes_are_launched_on_a_free_port():
    command = sweep.command_of(runs_of("table3_smoke", "--num_processes", "2")[0])
    assert command[4:9] == ["--num_processes", "2", "--multi_gpu", "--main_process_port", "0"]


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


BROKEN = {
    "truncated": (lambda folder: (folder / "result.json").write_text('{"top1_best"'), "Expecting"),
    "not a mapping": (lambda folder: (folder / "result.json").write_text("[]"), "top1_best is None"),
    "no number": (lambda folder: edit(folder / "result.json", top1_best=float("nan")), "top1_best is nan"),
    "a string": (lambda folder: edit(folder / "result.json", wall_time_seconds="2"), "wall_time_seconds is '2'"),
    "no config": (lambda folder: edit(folder / "result.json", config=1), "config is 1"),
    "no metrics": (lambda folder: (folder / "metrics.csv").unlink(), "metrics.csv"),
    "bad metrics": (lambda folder: (folder / "metrics.csv").write_text("epoch,test_top1\n1,abc\n"), "abc"),
    "short metrics": (lambda folder: (folder / "metrics.csv").write_text("epoch,test_top1\n1,5\n"), "has 1 rows"),
    "other best": (lambda folder: edit(folder / "result.json", top1_best=99.0), "99.0 in result.json and 90.0"),
    "other last": (lambda folder: edit(folder / "result.json", top1_last=99.0), "99.0 in result.json and 80.0"),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_a_broken_result_is_not_a_result(tmp_path, damage):
    run = runs_of(write_table(tmp_path / "t.yaml"))[0]
    finish(run)
    assert findings.inspect_run(run.folder, run.settings).state == "done"
    BROKEN[damage][0](run.folder)
    found = findings.inspect_run(run.folder, run.settings)
    assert (found.state, found.result) == ("broken", {})
    assert BROKEN[damage][1] in found.why


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_with_other_settings_is_refused(tmp_path, finished):
    path = write_table(tmp_path / "t.yaml")
    run = runs_of(path)[4]
    finish(run, lr=0.7)
    if not finished:
        (run.folder / "result.json").unlink()
    message = rf"{re.escape(str(run.folder))} holds a run with other settings: lr \(there 0\.7, asked "
    with pytest.raises(RecipeError, match=message):
        sweep.sweep(options(path))
    finish(runs_of(path)[0])
    with pytest.raises(RecipeError, match=r"plain/seed0 .*num_processes \(there 1, asked 2\)"):
        sweep.sweep(options(path, "--num_processes", "2", "--dry_run"))


def test_a_setting_that_is_new_has_its_default(tmp_path):
    run = runs_of(write_table(tmp_path / "t.yaml"))[0]
    older = {key: value for key, value in run.settings.items() if key != "ema_decay"} | {"num_workers": 3}
    write_run(run.folder, older, [1.0, 2.0, 3.0, 4.0])
    assert findings.inspect_run(run.folder, run.settings).state == "done"
    with pytest.raises(RecipeError, match=r"ema_decay \(there None, asked 0\.9\)"):
        findings.inspect_run(run.folder, run.settings | {"ema_decay": 0.9})
    # before the setting existed, the loss was a sum
    assert study.differences({"lr": 1}, {"lr": 1, "combine": "sum"}) == []
    assert study.differences({"lr": 1}, {"lr": 1, "combine": "mean"}) == ["combine (there 'sum', asked 'mean')"]


def test_a_sweep_may_grow_and_not_change(tmp_path, monkeypatch, capsys):
    stand_in(tmp_path, monkeypatch, "finish()\n")
    path = write_table(tmp_path / "t.yaml")
    rows = yaml.safe_load(path.read_text())["rows"]
    assert sweep.sweep(options(path, "--seeds", "[0]")) == 0
    assert sweep.sweep(options(path, "--seeds", "[0,1]")) == 0
    assert "8 runs, 4 done, 4 to do" in capsys.readouterr().out
    with pytest.raises(RecipeError, match=r"does not contain: seed 0\. .*go on with that one: python .*sweep\.py"):
        sweep.sweep(options(path, "--seeds", "[1,2]"))
    with pytest.raises(RecipeError, match=r"does not contain: digits/C-DropBlock"):
        sweep.sweep(options(write_table(path, rows=rows[:3]), "--seeds", "[0,1]"))
    (tmp_path / "t" / "sweep.yaml").write_text("table: [")
    with pytest.raises(RecipeError, match=r"sweep\.yaml cannot be read .*mv "):
        sweep.sweep(options(path, "--seeds", "[0,1]"))


def test_a_folder_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match=r"cannot write to .*file/runs"):
        sweep.sweep(options(write_table(tmp_path / "t.yaml", output_dir=str(tmp_path / "file" / "runs"))))
    (tmp_path / "t").mkdir()
    with FileLock(tmp_path / "t" / ".lock"), pytest.raises(RecipeError, match=r"another process works in .*t;"):
        sweep.sweep(options(write_table(tmp_path / "t.yaml")))


# --- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_without_a_result_fails_and_stops_no_other(tmp_path, monkeypatch, capsys):
    fail = "if args.seed == 1 and args.method == 'none': print('error: the disk is full'); sys.exit(0)\nfinish()\n"
    stand_in(tmp_path, monkeypatch, fail)
    path = write_table(tmp_path / "t.yaml")
    assert sweep.sweep(options(path, "--jobs", "2")) == 1
    printed = capsys.readouterr()
    assert len(list((tmp_path / "t").rglob("result.json"))) == 11
    assert "digits/plain/seed1: failed: error: the disk is full" in printed.out
    assert "11 done, 1 failed" in printed.out
    assert "digits/plain/seed1: error: the disk is full (log: " in printed.err
    assert "the disk is full" in (tmp_path / "t" / "digits" / "plain" / "seed1.log").read_text()
    stand_in(tmp_path, monkeypatch, "assert (args.seed, args.method) == (1, 'none')\nfinish()\n")
    assert sweep.sweep(options(path)) == 0  # only the failed one is started


MEET = """
marks = pathlib.Path(os.environ["MARKS"])
(marks / args.method).touch()
while len(list(marks.iterdir())) < 2: time.sleep(0.02)  # alone, it would wait for ever
finish()
(folder / "seen").write_text(os.environ["CUDA_VISIBLE_DEVICES"] + " " + os.environ["OMP_NUM_THREADS"])
"""


@pytest.mark.parametrize(
    ("gpus", "cluster", "seen"),
    [("4,5", (), ["4", "5"]), ("4,5", ("--cluster", "local"), ["4", "5"]), ("7", (), ["7", "7"])],
)
def test_runs_side_by_side_have_a_gpu_each(tmp_path, monkeypatch, gpus, cluster, seen):
    (tmp_path / "marks").mkdir()
    monkeypatch.setenv("MARKS", str(tmp_path / "marks"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    stand_in(tmp_path, monkeypatch, MEET)
    rows = [{"name": name, "set": {"method": name}} for name in ("none", "dropblock")]
    path = write_table(tmp_path / "t.yaml", rows=rows, stages=[])
    assert sweep.sweep(options(path, "--jobs", "2", "--seeds", "[0]", *cluster)) == 0
    assert sorted(file.read_text().split()[0] for file in tmp_path.rglob("seen")) == seen


def test_a_run_of_two_processes_holds_two_gpus_and_its_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(12))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    here = sweep.Processes(jobs=2, num_processes=2)
    assert here.environment["OMP_NUM_THREADS"] == "3"
    with here.gpus() as first, here.gpus() as second:
        assert (first, second) == ({"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with sweep.Processes(jobs=2, num_processes=1).gpus() as none:
        assert none == {}


def test_an_unusable_folder_is_set_aside_once_and_kept(tmp_path, monkeypatch, capsys):
    refuse = "if folder.exists(): sys.exit(f'error: resume: {folder}/checkpoint cannot be read')\nfinish()\n"
    stand_in(tmp_path, monkeypatch, refuse)
    path = write_table(tmp_path / "t.yaml")
    folder = runs_of(path)[0].folder
    (folder / "checkpoint").mkdir(parents=True)
    (folder / "checkpoint" / "state.json").write_text("precious")
    folder.with_name("seed0.unusable1").mkdir()  # from an earlier sweep
    assert sweep.sweep(options(path, "--seeds", "[0]")) == 0
    assert (folder.with_name("seed0.unusable2") / "checkpoint" / "state.json").read_text() == "precious"
    assert "the old files are in seed0.unusable2" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.nightly)])
def test_a_signal_lets_the_runs_save(tmp_path, number):
    """The real command in a process of its own; SIGINT reaches the training process, which writes and ends."""
    path = write_table(tmp_path / "t.yaml")
    folder = tmp_path / "t" / "digits" / "plain" / "seed0"
    (tmp_path / "train.py").write_text(
        f"import pathlib, time\nfolder = pathlib.Path({str(folder)!r})\n"
        "folder.mkdir(parents=True)\n(folder / 'started').touch()\n"
        "try:\n    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    time.sleep(0.5)\n    (folder / 'checkpoint').mkdir()\n"
    )
    launcher = [sys.executable, "-c", "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))"]
    (tmp_path / "start.py").write_text(
        f"import sys\nsys.path[:0] = [{str(RECIPES)!r}, {str(ROOT)!r}]\nimport sweep\n"
        f"sweep.command_of = lambda run: [*{launcher!r}, {sys.executable!r}, {str(tmp_path / 'train.py')!r}]\n"
        "sweep.main()\n"
    )
    process = subprocess.Popen(
        ["sh", "-c", "trap '' INT; exec \"$@\"", "sh", sys.executable, str(tmp_path / "start.py"), str(path)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (folder / "started").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (folder / "checkpoint").is_dir()  # it had the time to save
    assert "1 stopped, 11 not started" in out
    assert "run the same command again to go on" in err


def test_a_job_that_fails_has_its_last_line(tmp_path, monkeypatch, capsys):
    stand_in(tmp_path, monkeypatch, "sys.exit('error: no such data')\n")
    words = ("--seeds", "[0]", "--cluster", "local", "--cluster_options", "{timeout_min: 3}", "--jobs", "4")
    assert sweep.sweep(options(write_table(tmp_path / "t.yaml"), *words)) == 1
    assert len(list((tmp_path / "t" / "submitit").glob("*_submitted.pkl"))) == 4
    assert "digits/DropBlock/seed0: error: no such data (log: " in capsys.readouterr().err


def test_what_submitit_rejects_is_one_error(tmp_path, monkeypatch):
    path = write_table(tmp_path / "t.yaml")
    with pytest.raises(RecipeError, match=r"--cluster local with .*no_such"):
        sweep.sweep(options(path, "--cluster", "local", "--cluster_options", "{no_such: 1}"))
    monkeypatch.setitem(sys.modules, "submitit", None)  # as if it were not installed
    with pytest.raises(RecipeError, match=r"pip install 'rblock-fx\[slurm\]'"):
        sweep.sweep(options(path, "--cluster", "local"))
