"""The KubeRay files: the resource definitions' fields, and what a run on Kubernetes relies on."""

import copy
import re
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray.runtime_env import RuntimeEnv

from finescope.config import Recipe

ROOT = Path(__file__).resolve().parents[2]
KUBERAY = [ROOT / "cluster" / "kuberay" / "rayjob.yaml", ROOT / "cluster" / "kuberay" / "raycluster.yaml"]


def _object(required: str, **known: Any) -> dict[str, Any]:
    """JSON schema of an object with these keys and no other."""
    return {"type": "object", "required": required.split(), "properties": known, "additionalProperties": False}


# The ray.io/v1 resource definitions of KubeRay 1.5 and the pod fields that the files use. An unknown key is dropped or refused
# by the API server, so none is let through here.
TEXT, FLAG, ANY = {"type": "string", "minLength": 1}, {"type": "boolean"}, {}
COUNT = {"type": "integer", "minimum": 0}
STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
QUANTITIES = _object("requests limits", requests=STRINGS, limits=STRINGS)
CONTAINER_SECURITY = _object(
    "allowPrivilegeEscalation capabilities",
    allowPrivilegeEscalation={"const": False},
    capabilities=_object("drop", drop={"const": ["ALL"]}),
)
POD_SECURITY = _object(
    "runAsNonRoot runAsUser",
    runAsNonRoot={"const": True},
    runAsUser={"type": "integer", "minimum": 1},
    runAsGroup=COUNT,
    fsGroup=COUNT,
    fsGroupChangePolicy={"enum": ["Always", "OnRootMismatch"]},
    seccompProfile=_object("type", type=TEXT),
)
CONTAINER = _object(
    "name image securityContext resources",
    name=TEXT,
    image=TEXT,
    imagePullPolicy={"enum": ["Always", "IfNotPresent", "Never"]},
    workingDir=TEXT,
    securityContext=CONTAINER_SECURITY,
    ports={"type": "array", "items": _object("name containerPort", name=TEXT, containerPort=COUNT)},
    env={"type": "array", "items": _object("name value", name=TEXT, value=TEXT)},
    envFrom={"type": "array", "items": _object("secretRef", secretRef=ANY)},
    resources=QUANTITIES,
    volumeMounts={"type": "array", "items": _object("name mountPath", name=TEXT, mountPath=TEXT)},
)
POD = _object(
    "containers securityContext restartPolicy",
    restartPolicy={"const": "Never"},
    terminationGracePeriodSeconds=COUNT,
    automountServiceAccountToken=FLAG,
    securityContext=POD_SECURITY,
    tolerations={"type": "array", "items": _object("key operator effect", key=TEXT, operator=TEXT, value=TEXT, effect=TEXT)},
    containers={"type": "array", "minItems": 1, "items": CONTAINER},
    volumes={"type": "array", "items": _object("name persistentVolumeClaim", name=TEXT, persistentVolumeClaim=ANY)},
)
TEMPLATE = _object("spec", metadata=ANY, spec=POD)
AUTOSCALER_OPTIONS = _object(
    "version",
    version={"enum": ["v1", "v2"]},
    upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
    idleTimeoutSeconds=COUNT,
    imagePullPolicy=TEXT,
    securityContext=CONTAINER_SECURITY,
    resources=QUANTITIES,
)
WORKER_GROUP = _object(
    "groupName replicas minReplicas maxReplicas rayStartParams template",
    groupName=TEXT,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    idleTimeoutSeconds=COUNT,
    numOfHosts=COUNT,
    rayStartParams=STRINGS,
    template=TEMPLATE,
)
CLUSTER_SPEC = _object(
    "rayVersion headGroupSpec workerGroupSpecs",
    rayVersion=TEXT,
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=AUTOSCALER_OPTIONS,
    authOptions=_object("mode", mode={"enum": ["disabled", "token"]}),
    headGroupSpec=_object("rayStartParams template", serviceType=TEXT, rayStartParams=STRINGS, template=TEMPLATE),
    workerGroupSpecs={"type": "array", "minItems": 1, "items": WORKER_GROUP},
)
JOB_SPEC = _object(
    "entrypoint rayClusterSpec",
    entrypoint=TEXT,
    runtimeEnvYAML=TEXT,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"]},
    backoffLimit=COUNT,
    submitterConfig=_object("backoffLimit", backoffLimit=COUNT),
    submitterPodTemplate=TEMPLATE,
    shutdownAfterJobFinishes=FLAG,
    ttlSecondsAfterFinished=COUNT,
    activeDeadlineSeconds=COUNT,
    rayClusterSpec=CLUSTER_SPEC,
)
V1, NAMED = {"const": "ray.io/v1"}, _object("name", name=TEXT)
RESOURCE = {
    kind: _object("apiVersion kind metadata spec", apiVersion=V1, kind={"const": kind}, metadata=NAMED, spec=spec)
    for kind, spec in {"RayJob": JOB_SPEC, "RayCluster": CLUSTER_SPEC}.items()
}


def documents(path: Path) -> dict[str, dict[str, Any]]:
    """The resources of a Kubernetes file by kind."""
    return {document["kind"]: document for document in yaml.safe_load_all(path.read_text())}


def ray_resource(path: Path) -> dict[str, Any]:
    (kind,) = documents(path).keys() & RESOURCE.keys()
    return documents(path)[kind]


def cluster_spec(path: Path) -> dict[str, Any]:
    spec = ray_resource(path)["spec"]
    return spec.get("rayClusterSpec", spec)


def pods(path: Path) -> list[dict[str, Any]]:
    """Head, then workers, then submitter."""
    spec, found = cluster_spec(path), [cluster_spec(path)["headGroupSpec"]["template"]["spec"]]
    found += [group["template"]["spec"] for group in spec["workerGroupSpecs"]]
    submitter = ray_resource(path)["spec"].get("submitterPodTemplate")
    return found + ([submitter["spec"]] if submitter else [])


def required_paths(schema: dict[str, Any], node: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where in a valid document a field stands that its schema requires."""
    if isinstance(node, list):
        return [path for i, item in enumerate(node) for path in required_paths(schema.get("items", {}), item, (*at, i))]
    if not isinstance(node, dict):
        return []
    found = [(*at, key) for key in schema.get("required", [])]
    for key, child in node.items():
        found += required_paths(schema.get("properties", {}).get(key, {}), child, (*at, key))
    return found


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.name)
def test_kuberay_file_has_the_definitions_fields_and_no_other(path: Path):
    """And each required field is truly required: without it the same document is refused."""
    resource = ray_resource(path)
    schema = RESOURCE[resource["kind"]]
    jsonschema.validate(resource, schema)
    required = required_paths(schema, resource)
    assert len(required) > 30
    for *parents, key in required:
        broken = node = copy.deepcopy(resource)
        for parent in parents:
            node = node[parent]
        del node[key]
        assert not jsonschema.Draft202012Validator(schema).is_valid(broken), (*parents, key)


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.name)
def test_kuberay_cluster_scales_from_no_gpu_under_a_head_without_tasks(path: Path):
    spec = cluster_spec(path)
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    head, *others = pods(path)
    assert "nvidia.com/gpu" not in head["containers"][0]["resources"]["limits"]
    for group, pod in zip(spec["workerGroupSpecs"], others, strict=False):
        assert (group["replicas"], group["minReplicas"]) == (0, 0)
        assert group["maxReplicas"] >= 1
        assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
        assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in pod["tolerations"]


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.name)
def test_kuberay_nodes_share_one_volume(path: Path):
    claim = documents(path)["PersistentVolumeClaim"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in pods(path)[: 1 + len(cluster_spec(path)["workerGroupSpecs"])]:
        (volume,) = pod["volumes"]
        (mount,) = pod["containers"][0]["volumeMounts"]
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert (mount["name"], mount["mountPath"]) == (volume["name"], "/shared")


def test_both_kuberay_files_describe_the_same_cluster():
    assert cluster_spec(KUBERAY[0]) == cluster_spec(KUBERAY[1])


def test_rayjob_runs_a_shipped_recipe_and_cleans_up():
    spec = ray_resource(KUBERAY[0])["spec"]
    python, program, recipe = spec["entrypoint"].split()
    assert python == "python"
    assert (ROOT / program).is_file()
    Recipe.model_validate(yaml.safe_load((ROOT / recipe).read_text()))
    assert spec["submitterConfig"]["backoffLimit"] == 0, "a second submitter would submit the same job twice"
    assert spec["backoffLimit"] >= 1
    assert spec["shutdownAfterJobFinishes"] is True
    assert set(yaml.safe_load(spec["runtimeEnvYAML"])) <= RuntimeEnv.known_fields


def test_versions_are_the_images_and_the_packages():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    dockerfile = (ROOT / "Dockerfile").read_text()
    arguments = set(re.findall(r"^ARG RAY_VERSION=(\S+)$", dockerfile, re.M))
    assert {cluster_spec(path)["rayVersion"] for path in KUBERAY} == arguments == {ray.__version__}
    images = {container["image"] for path in KUBERAY for pod in pods(path) for container in pod["containers"]}
    assert images == {f"finescope:{version}"}, "no registry host, the package's version"
    assert f"docker build -t finescope:{version} ." in dockerfile


def test_pods_run_as_the_images_user_in_its_folder():
    dockerfile = (ROOT / "Dockerfile").read_text()
    (user,) = re.findall(r"^USER (\d+):\d+$", dockerfile, re.M)
    assert {str(pod["securityContext"]["runAsUser"]) for path in KUBERAY for pod in pods(path)} == {user}
    (*_, folder) = re.findall(r"^WORKDIR (\S+)$", dockerfile, re.M)
    assert {pod["containers"][0].get("workingDir", folder) for path in KUBERAY for pod in pods(path)} == {folder}
