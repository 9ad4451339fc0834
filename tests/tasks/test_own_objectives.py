"""`--task my_module.MyTask`: your own objectives are trained, evaluated and served by the real commands."""

import json
import random
from pathlib import Path
from typing import Any

import httpx

from tests.conftest import RunFst
from tests.logged_process import running_service

_HERE = "tests.tasks.own_objectives"
_QUICK = (
    *("--model_config", "decoder-tiny", "--max_length", "48", "--num_warmup_steps", "2"),
    *("--accelerator", "cpu", "--devices", "1", "--precision", "32", "--compile", "never"),
)


def _write_rows(directory: Path) -> Path:
    directory.mkdir()
    for seed, (split, number) in enumerate({"train": 96, "valid": 24, "test": 24}.items()):
        draw = random.Random(seed)
        rows = []
        for _ in range(number):
            is_loud = draw.random() < 0.4
            text = " ".join(draw.choice(("hey", "you", "come", "here")) for _ in range(4))
            rows.append({"said": f"{text.upper()}!" if is_loud else text, "is_loud": is_loud})
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return directory


def _train(run_fst: RunFst, task: str, data: Path, root: Path, *options: str) -> Path:
    words = ("--task", f"{_HERE}.{task}", "--dataset_dir", data, "--experiments_root", root)
    done = run_fst("train", *words, *_QUICK, *options)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


def _evaluate(run_fst: RunFst, experiment: Path, data: Path) -> dict[str, Any]:
    words = ("--device", "cpu", "--num_resamples", "20", "--allow_code_from", _HERE)
    done = run_fst("evaluate", experiment, data, *words)
    assert done.returncode == 0, done.stderr
    content: dict[str, Any] = json.loads(done.stdout)
    return content


def _description(experiment: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((experiment / "model/description.json").read_text())
    return content


def test_objectives_of_ones_own_are_trained_evaluated_and_served(
    run_fst: RunFst, dataset_dir: Path, tmp_path: Path
) -> None:
    # Over a corpus.
    ahead = _train(
        run_fst,
        "TokenAfterNext",
        dataset_dir,
        tmp_path / "ahead",
        *("--max_steps", "6", "--metric_for_best_model", "accuracy"),
    )
    description = _description(ahead)
    assert description["task"] == "token_after_next"
    assert description["task_class"] == f"{_HERE}.TokenAfterNext"
    assert "predicts the token after the next one" in (ahead / "model/README.md").read_text()
    found = _evaluate(run_fst, ahead, dataset_dir)
    assert found["task"] == "token_after_next"
    assert abs(found["loss"] - description["validation_loss"]) < 1e-4
    assert abs(found["accuracy"] - description["validation_accuracy"]) < 1e-6

    # Over rows, whose field has another name in the data set.
    rows = _write_rows(tmp_path / "rows")
    loud = _train(
        run_fst,
        "Loudness",
        rows,
        tmp_path / "loud",
        *("--max_epochs", "4", "--learning_rate", "1e-2", "--vocab_size", "280"),
        *("--metric_for_best_model", "accuracy", "--do_train", "--do_predict"),
    )
    assert _description(loud)["task"] == "loudness"
    assert len((loud / "test_predictions.jsonl").read_text().splitlines()) == 24
    found = _evaluate(run_fst, loud, rows)
    assert found["figures"]["accuracy"] > 0.9
    assert set(found["baselines"]) == {"majority", "untrained"}
    assert found["baselines"]["majority"]["accuracy"] < found["figures"]["accuracy"]

    served = running_service(loud, "--more_models", f"ahead={ahead}", "--allow_code_from", _HERE)
    with served as (url, process), httpx.Client(base_url=url, timeout=120) as http:
        answer = http.post("/is_shouting", json={"utterances": ["HEY YOU COME HERE!", "hey you"]})
        assert answer.status_code == 200, answer.text
        assert answer.json()["is_loud"] == [True, False]
        answer = http.post("/look_ahead", json={"texts": ["The reader", "The corpus"]})
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == "ahead"
        assert [set(one) for one in answer.json()["predictions"]] == [{"token"}] * 2
        wrong = http.post("/is_shouting", json={"utterances": []})
        assert wrong.status_code == 422
        forms = {one["task"]: one["form"] for one in http.get("/version").json()["models"]}
        assert forms["loudness"]["verb"] == "Listen"
        assert forms["loudness"]["fields"] == [{"name": "utterances", "takes": "lines"}]
        assert forms["token_after_next"]["path"] == "/look_ahead"
        documented = http.get("/openapi.json").json()["paths"]
        assert {"/is_shouting", "/look_ahead", "/classify"} <= documented.keys()
        assert process.stop() == 0


def test_a_task_that_cannot_be_imported_is_refused(run_fst: RunFst, tmp_path: Path) -> None:
    words = ("train", "--dataset_dir", tmp_path, "--task")
    for name, message in (
        ("unheard_of", "--task must be one of causal_lm"),
        ("no_module.Task", "should name a task"),
        (f"{_HERE}.ShoutRequest", "is no task"),
    ):
        done = run_fst(*words, name)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
        assert "Traceback" not in done.stderr
