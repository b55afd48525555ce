"""The Kubernetes manifests: valid by schema, and consistent with each other, the server and the hardware."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
from jaxllama_serving.config import ServerConfig
from jaxllama_serving.http.app import make_app
from jaxllama_serving.metrics import GAUGES
from jaxllama_serving.process.server import CLOSE_TIMEOUT_S
from unit.deploy.files import MANIFESTS, command_of_container, documents, parse, pod_templates
from unit.serving.live import run

type Object = dict[str, Any]

HERE = Path(__file__).parent
SCHEMAS = {
    kind: json.loads((HERE / f"{kind.lower()}.schema.json").read_text())
    for kind in ("LeaderWorkerSet", "PodMonitoring")
}
KUBERNETES = kubernetes_validate.latest_version()
# What the README has people make before they apply the manifests.
CLAIMS = {"jaxllama-checkpoints"}
SECRETS = {"jaxllama-keys": {"keys", "metrics"}}


def all_objects() -> list[Object]:
    return [obj for path in MANIFESTS for obj in documents(path)]


def find(objects: list[Object], kind: str, name: str) -> Object:
    found = [obj for obj in objects if (obj["kind"], obj["metadata"]["name"]) == (kind, name)]
    assert len(found) == 1, f"{len(found)} objects are {kind} {name}"
    return found[0]


# ---- Checks. Each raises for the first thing that is wrong. ----


def check_schema(objects: list[Object]) -> None:
    """Every object by the schema of its kind, unknown fields refused; pod templates of custom kinds as pods."""
    for obj in objects:
        if obj["kind"] in SCHEMAS:
            jsonschema.validate(obj, SCHEMAS[obj["kind"]])
            for template in pod_templates(obj).values():
                pod = {
                    "apiVersion": "v1",
                    "kind": "Pod",
                    "metadata": template.get("metadata", {}),
                    "spec": template["spec"],
                }
                kubernetes_validate.validate(pod, KUBERNETES, strict=True)
        else:
            kubernetes_validate.validate(obj, KUBERNETES, strict=True)


def templates(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    for obj in objects:
        for name, template in pod_templates(obj).items():
            yield f"{obj['metadata']['name']} {name}", template


def check_drain(objects: list[Object]) -> None:
    """A pod is given the time that its server takes to drain; a slice's workers as long as their leader at least."""
    for obj in objects:
        leader_s = 0
        for name, template in pod_templates(obj).items():
            given_s = template["spec"]["terminationGracePeriodSeconds"]
            assert given_s >= leader_s, f"{name} is killed before its leader has drained"
            (container,) = template["spec"]["containers"]
            if "lifecycle" in container:
                args = parse(command_of_container(name, container))
                waits_s = container["lifecycle"]["preStop"]["sleep"]["seconds"]
                assert given_s > waits_s + args.drain_timeout + CLOSE_TIMEOUT_S, (
                    f"{name} is killed before it has drained"
                )
                leader_s = given_s


def routes() -> set[str]:
    async def find() -> set[str]:
        return {resource.canonical for resource in make_app(None, ServerConfig(("default",))).router.resources()}

    return run(find())


def check_probes(objects: list[Object]) -> None:
    """Ready by /ready, alive by /health, half an hour to start, on the port that the server listens on."""
    known = routes()
    for where, template in templates(objects):
        (container,) = template["spec"]["containers"]
        if "workerTemplate" in where:
            assert not any(name.endswith("Probe") for name in container), f"{where} serves no HTTP"
            continue
        probes = {name: container[f"{name}Probe"] for name in ("startup", "readiness", "liveness")}
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        args = parse(command_of_container(where, container))
        assert args.host == "0.0.0.0", f"{where} listens where no probe reaches it"
        for probe in probes.values():
            assert probe["httpGet"]["path"] in known, f"{where}: no such route"
            assert ports[probe["httpGet"]["port"]] == args.port, f"{where}: another port than --port"
        paths = {name: probe["httpGet"]["path"] for name, probe in probes.items()}
        assert paths == {"startup": "/ready", "readiness": "/ready", "liveness": "/health"}, where
        seconds = probes["startup"]["periodSeconds"] * probes["startup"]["failureThreshold"]
        assert seconds >= 1800, f"{where}: {seconds} s to load and compile"


def check_references(objects: list[Object]) -> None:
    """Selectors, scale targets, volumes, secrets and claims name what exists."""
    labels = [template["metadata"]["labels"] for _, template in templates(objects)]

    def selects(selector: Object) -> bool:
        return any(selector.items() <= label.items() for label in labels)

    for obj in objects:
        name, spec = obj["metadata"]["name"], obj.get("spec", {})
        selector = spec.get("selector", {})
        if selector:
            assert selects(selector.get("matchLabels", selector)), f"{obj['kind']} {name} selects no pod"
        if obj["kind"] == "HorizontalPodAutoscaler":
            find(objects, spec["scaleTargetRef"]["kind"], spec["scaleTargetRef"]["name"])
        if obj["kind"] == "RoleBinding":
            find(objects, obj["roleRef"]["kind"], obj["roleRef"]["name"])
        if obj["kind"] == "PodMonitoring":
            for endpoint in spec["endpoints"]:
                secret = endpoint["authorization"]["credentials"]["secret"]
                assert secret["key"] in SECRETS[secret["name"]]
                assert endpoint["path"] in routes()
    for where, template in templates(objects):
        check_volumes(where, template["spec"])


def check_volumes(where: str, spec: Object) -> None:
    (container,) = spec["containers"]
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    assert len(mounts) == len(volumes), f"{where}: a volume without a mount"
    for volume in volumes.values():
        if "secret" in volume:
            keys = {item["key"] for item in volume["secret"]["items"]}
            assert keys <= SECRETS[volume["secret"]["secretName"]], where
            assert volume["secret"]["defaultMode"] == 0o400, f"{where}: keys that others may read"
        if "persistentVolumeClaim" in volume:
            assert volume["persistentVolumeClaim"]["claimName"] in CLAIMS, where
    args = parse(command_of_container(where, container))
    assert str(Path(args.checkpoint).parent) in mounts, f"{where}: the checkpoint lies on no volume"
    assert str(args.api_key_file.parent) in mounts, f"{where}: the keys lie on no volume"
    assert "emptyDir" in mounts[args.compilation_cache], f"{where}: the cache cannot be written"


def check_chips(objects: list[Object]) -> None:
    """The chips that the pods of a group ask for are those of the topology."""
    for obj in objects:
        group = list(pod_templates(obj).values())
        if not group:
            continue
        size = obj["spec"].get("leaderWorkerTemplate", {}).get("size", 1)
        pods = group if size == 1 else [group[0]] + [group[1]] * (size - 1)
        chips = 0
        for pod in pods:
            (container,) = pod["spec"]["containers"]
            assert container["resources"]["requests"] == container["resources"]["limits"]
            chips += container["resources"]["limits"]["google.com/tpu"]
        (topology,) = {pod["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"] for pod in pods}
        (_,) = {pod["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] for pod in pods}
        assert chips == math.prod(map(int, topology.split("x"))), f"{chips} chips on a slice of {topology}"


def check_metrics(objects: list[Object]) -> None:
    """The autoscaler asks for gauges that the server has, the queue's among them."""
    (scaler,) = [obj for obj in objects if obj["kind"] == "HorizontalPodAutoscaler"]
    names = [metric["pods"]["metric"]["name"] for metric in scaler["spec"]["metrics"]]
    gauges = [name.removeprefix("prometheus.googleapis.com|").removesuffix("|gauge") for name in names]
    assert set(gauges) <= set(GAUGES), f"no such gauge among {gauges}"
    assert "jaxllama_requests_waiting" in gauges


def check_processes(objects: list[Object]) -> None:
    """One process a pod of the slice, all with the same command, meeting at the leader on a port of its own."""
    spec = find(objects, "LeaderWorkerSet", "jaxllama-slice")["spec"]["leaderWorkerTemplate"]
    (leader,), (worker,) = (spec[name]["spec"]["containers"] for name in ("leaderTemplate", "workerTemplate"))
    for field in ("image", "command", "args"):
        assert leader[field] == worker[field], f"the workers have another {field}"
    flags = ("--num-processes=$(LWS_GROUP_SIZE)", "--process-id=$(LWS_WORKER_INDEX)")
    assert set(flags) <= set(leader["args"])
    (address,) = [arg.removeprefix("--coordinator=") for arg in leader["args"] if arg.startswith("--coordinator=")]
    host, port = address.split(":")
    assert host == "$(LWS_LEADER_ADDRESS)"
    ports = {port["name"]: port["containerPort"] for port in leader["ports"]}
    assert ports["coordinator"] == int(port), "the coordinator listens on another port"
    # libtpu's metrics, the addresses that GKE and LeaderWorkerSet give its processes, and JAX's own coordinator.
    assert int(port) not in {8000, 8431, *range(8470, 8483)}, f"port {port} is taken"


CHECKS = (
    check_schema,
    check_drain,
    check_probes,
    check_references,
    check_chips,
    check_metrics,
    check_processes,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_manifests_pass(check: Callable[[list[Object]], None]):
    check(all_objects())


# ---- and a broken one does not ----


def containers(objects: list[Object]) -> dict[str, Object]:
    return {where: template["spec"]["containers"][0] for where, template in templates(objects)}


def edit(path: str, value: Any) -> Callable[[list[Object]], None]:
    """Sets `KIND NAME field.field…` to `value`; None deletes it."""

    def apply(objects: list[Object]) -> None:
        kind, name, fields = path.split(" ")
        *parents, last = fields.split(".")
        obj: Any = find(objects, kind, name)
        for field in parents:
            obj = obj[int(field) if field.isdecimal() else field]
        if value is None:
            del obj[last]
        else:
            obj[int(last) if last.isdecimal() else last] = value

    return apply


POD = "Deployment jaxllama spec.template.spec"
LEADER = "LeaderWorkerSet jaxllama-slice spec.leaderWorkerTemplate.leaderTemplate.spec"
WORKER = "LeaderWorkerSet jaxllama-slice spec.leaderWorkerTemplate.workerTemplate.spec"
BROKEN = [
    (check_schema, edit(f"{POD}.containers.0.livenesProbe", {}), "livenesProbe"),
    (check_schema, edit(f"{POD}.terminationGracePeriodSeconds", "150s"), "150s"),
    (check_schema, edit("Deployment jaxllama spec.selector", None), "selector"),
    (check_schema, edit("Service jaxllama spec.ports.0.port", "http"), "http"),
    (check_schema, edit("PodDisruptionBudget jaxllama spec.maxUnavailble", 1), "maxUnavailble"),
    (check_schema, edit("LeaderWorkerSet jaxllama-slice spec.leaderWorkerTemplate.restartPolicy", "Always"), "Always"),
    (check_schema, edit("LeaderWorkerSet jaxllama-slice spec.size", 4), "size"),
    (check_schema, edit(f"{WORKER}.containers.0.arg", []), "arg"),
    (check_schema, edit("PodMonitoring jaxllama spec.endpoints.0.interval", "15"), "15"),
    (check_drain, edit(f"{POD}.terminationGracePeriodSeconds", 60), "before it has drained"),
    (check_drain, edit(f"{POD}.containers.0.args.5", "--drain-timeout=600"), "before it has drained"),
    (check_drain, edit(f"{WORKER}.terminationGracePeriodSeconds", 30), "before its leader"),
    (check_probes, edit(f"{POD}.containers.0.readinessProbe.httpGet.path", "/readyz"), "no such route"),
    (check_probes, edit(f"{POD}.containers.0.livenessProbe.httpGet.path", "/ready"), "liveness"),
    (check_probes, edit(f"{POD}.containers.0.args.2", "--port=8080"), "another port"),
    (check_probes, edit(f"{POD}.containers.0.args.1", "--host=127.0.0.1"), "no probe reaches"),
    (check_probes, edit(f"{LEADER}.containers.0.startupProbe.failureThreshold", 3), "30 s to load"),
    (check_references, edit("Service jaxllama-slice spec.selector.app", "jaxlama"), "selects no pod"),
    (check_references, edit("HorizontalPodAutoscaler jaxllama spec.scaleTargetRef.name", "x"), "0 objects"),
    (check_references, edit(f"{POD}.volumes.1.secret.defaultMode", 0o444), "others may read"),
    (check_references, edit(f"{POD}.containers.0.volumeMounts.0.mountPath", "/models"), "lies on no volume"),
    (
        check_chips,
        edit(f"{WORKER}.containers.0.resources", {k: {"google.com/tpu": 8} for k in ("requests", "limits")}),
        "28 chips",
    ),
    (check_chips, edit("LeaderWorkerSet jaxllama-slice spec.leaderWorkerTemplate.size", 2), "8 chips"),
    (
        check_metrics,
        edit("HorizontalPodAutoscaler jaxllama spec.metrics.0.pods.metric.name", "jaxllama_queue"),
        "no such gauge",
    ),
    (check_processes, edit(f"{WORKER}.containers.0.args", ["/checkpoints/model"]), "another args"),
    (check_processes, edit(f"{LEADER}.containers.0.ports.1.containerPort", 8476), "another port"),
]


@pytest.mark.parametrize(("check", "break_it", "message"), BROKEN, ids=[f"{c.__name__}-{m}" for c, _, m in BROKEN])
def test_a_broken_manifest_is_found(check, break_it, message):
    # Anchors make the templates share their parts: a round through JSON parts them.
    objects = json.loads(json.dumps(all_objects()))
    break_it(objects)
    with pytest.raises((AssertionError, jsonschema.ValidationError), match=message):
        check(objects)
