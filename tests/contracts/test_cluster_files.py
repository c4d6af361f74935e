"""What ships beside the package: `ray up` files, runtime environment, Dockerfile, constraints; names and versions in all."""

import copy
import fnmatch
import json
import re
import tomllib
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.runtime_env import RuntimeEnv

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
KUBERAY = [CLUSTER / "kuberay" / "rayjob.yaml", CLUSTER / "kuberay" / "raycluster.yaml"]
RAY_UP = [CLUSTER / "aws.yaml", CLUSTER / "gcp.yaml", CLUSTER / "azure.yaml"]
OTHERS = [CLUSTER / "runtime_env.yaml", ROOT / "Dockerfile", ROOT / ".dockerignore", ROOT / "constraints.txt"]
SHIPPED = [*KUBERAY, *RAY_UP, *OTHERS, *sorted((ROOT / "ray_jobs" / "recipes").glob("*.yaml"))]
AUTOSCALER = Path(ray.__file__).parent / "autoscaler"


def build_args() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name, default in re.findall(r"^ARG (\w+)=(\S+)$", (ROOT / "Dockerfile").read_text(), re.M):
        found.setdefault(name, set()).add(default)
    return found


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    return {name.lower(): version for name, version in (line.split("==") for line in lines)}


@pytest.mark.parametrize("path", RAY_UP, ids=lambda path: path.name)
def test_ray_up_file_is_valid_for_ray(path: Path):
    """By the schema as it stands, then by Ray's own check with its defaults filled in."""
    config = yaml.safe_load(path.read_text())
    jsonschema.validate(config, json.loads((AUTOSCALER / "ray-schema.json").read_text()))
    assert config["provider"]["type"] == path.stem
    validate_config(prepare_config(copy.deepcopy(config)))
    broken = prepare_config(copy.deepcopy(config)) | {"head_node_type": "nowhere"}
    with pytest.raises(ValueError, match="head_node_type"):
        validate_config(broken)


@pytest.mark.parametrize("path", RAY_UP, ids=lambda path: path.name)
def test_ray_up_workers_are_gpus_on_spot_from_none(path: Path):
    config = yaml.safe_load(path.read_text())
    types = config["available_node_types"]
    assert types.pop(config["head_node_type"])["resources"] == {"CPU": 0}
    assert types
    for worker in types.values():
        assert worker["min_workers"] == 0
        assert 1 <= worker["max_workers"] <= config["max_workers"]
        assert worker["resources"]["GPU"] >= 1
        node = worker["node_config"]
        spot = {
            "aws": lambda node: node["InstanceMarketOptions"]["MarketType"] == "spot",
            "gcp": lambda node: node["scheduling"]["provisioningModel"] == "SPOT",
            "azure": lambda node: node["azure_arm_parameters"]["priority"] == "Spot",
        }[path.stem]
        assert spot(node)
    assert config["idle_timeout_minutes"] >= 5


def test_azure_parameters_are_those_of_rays_template():
    template = json.loads((AUTOSCALER / "_private" / "_azure" / "azure-vm-template.json").read_text())
    for node in yaml.safe_load((CLUSTER / "azure.yaml").read_text())["available_node_types"].values():
        assert set(node["node_config"]["azure_arm_parameters"]) <= {*template["parameters"], "availability_zone"}


@pytest.mark.parametrize("path", RAY_UP, ids=lambda path: path.name)
def test_ray_up_nodes_install_this_checkout_with_the_tested_versions(path: Path):
    config = yaml.safe_load(path.read_text())
    sources = {remote: local for remote, local in config["file_mounts"].items() if not local.startswith("~")}
    for remote, local in sources.items():
        assert (ROOT / local).exists(), local
        assert remote == f"~/finescope/{local}"
    assert {"finescope", "ray_jobs", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"} == set(sources.values())
    (install,) = [command for command in config["setup_commands"] if '".[' in command]
    assert "--constraint constraints.txt" in install
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r'"\.\[([\w,]+)\]"', install)[0].split(",")) <= extras.keys()


@pytest.mark.parametrize("path", RAY_UP, ids=lambda path: path.name)
def test_ray_up_starts_ray_with_options_that_exist_and_a_token(path: Path):
    from ray.scripts.scripts import start

    config = yaml.safe_load(path.read_text())
    known = {option for parameter in start.params for option in parameter.opts}
    for command in config["head_start_ray_commands"][1:] + config["worker_start_ray_commands"][1:]:
        options = set(re.findall(r"--[\w-]+", command))
        assert options, command
        assert options <= known, options - known
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in config["head_start_ray_commands"][1]
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert any("RAY_AUTH_MODE=token" in command for command in config["setup_commands"])


def test_runtime_env_is_rays_and_leaves_the_heavy_folders_out():
    content = yaml.safe_load((CLUSTER / "runtime_env.yaml").read_text())
    assert content.keys() <= RuntimeEnv.known_fields, "Ray only warns about unknown keys"
    assert "working_dir" not in content, "the submitter names it"
    environment = RuntimeEnv(**content)
    assert {".git/", ".venv/", "runs/"} <= set(environment["excludes"])
    assert environment.env_vars()["TOKENIZERS_PARALLELISM"] == "false"


def test_versions_are_equal_everywhere():
    arguments, project = build_args(), tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert arguments["RAY_VERSION"] == {pins()["ray"]} == {ray.__version__}
    assert arguments["FINESCOPE_VERSION"] == {project["version"]}
    (python,) = arguments["PYTHON_VERSION"]
    assert project["requires-python"] == f">={python}"
    assert all(f"--python {python} " in path.read_text() for path in RAY_UP)


def test_constraints_are_exact_and_installable_elsewhere():
    found = pins()
    assert len(found) > 80
    assert [version for version in found.values() if not re.fullmatch(r"\d[\d.]*((\.post|rc|b|a)\d+)?", version)] == []
    foreign = [name for name in found if re.match(r"(nvidia|cuda|triton|finescope|pip$|setuptools$)", name)]
    assert foreign == [], "left to the platform or to the index"
    assert "python-dateutil" not in found, "botocore, of the s3 extra, needs an older one than the rest does"


def test_dockerfile_copies_what_exists_and_the_ignore_file_lets_through():
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignore, "an allow list"
    allowed = {line[1:] for line in ignore if line.startswith("!")}
    copies = re.findall(r"^COPY (?!--from)(?:--\S+ )*(.+) \S+$", (ROOT / "Dockerfile").read_text(), re.M)
    sources = {source for line in copies for source in line.split()}
    assert sources == allowed
    assert [source for source in sources if not (ROOT / source).exists()] == []
    assert not any(fnmatch.fnmatch(name, pattern) for name in (".venv", "runs", ".git") for pattern in allowed)


def test_image_is_built_in_two_stages_and_runs_unprivileged():
    text = (ROOT / "Dockerfile").read_text()
    stages = re.findall(r"^FROM (\S+) AS (\w+)$", text, re.M)
    assert [name for _, name in stages] == ["builder", "runtime"]
    assert all(image.startswith("nvidia/cuda:${CUDA_VERSION}-") for image, _ in stages), "no registry host"
    ((user, _),) = re.findall(r"^USER (\d+):(\d+)$", text.split("AS runtime")[1], re.M)
    assert int(user) >= 1000


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_named_files_exist_and_no_machine_of_ours_is_named(path: Path):
    text = path.read_text()
    named = re.findall(r"\b(?:cluster|ray_jobs|tests|docs)/[\w./-]*\w\.(?:yaml|py|md|txt)\b", text)
    assert [name for name in named if not (ROOT / name).is_file()] == []
    assert re.findall(r"(?:/work/|/tmp/|/root/|/Users/|/home/(?!ubuntu|finescope)|file://| @ )\S*", text) == []


def test_the_check_of_named_files_sees_names():
    assert "ray_jobs/recipes/llama-8b-cluster.yaml" in KUBERAY[0].read_text()
    assert all("cluster/runtime_env.yaml" in path.read_text() for path in RAY_UP)
