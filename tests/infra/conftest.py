"""The planned deployment that several tests look at, made once for each process."""

from collections.abc import Callable, Iterator

import pytest

from infra.local.servers import MissingServerError
from tests.conftest import missing
from tests.terraform.running import Resource, Terraform, terraform

Find = Callable[[str], Resource]


@pytest.fixture(scope="session")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terraform]:
    """The configuration in infra/, which the real `terraform` reads."""
    try:
        with terraform(tmp_path_factory.mktemp("terraform")) as ready:
            yield ready
    except MissingServerError as error:
        missing(error)


@pytest.fixture(scope="session")
def plan(deployment: Terraform) -> list[Resource]:
    """What is made where nothing but the project is said."""
    return deployment.plan()


@pytest.fixture
def find(plan: list[Resource]) -> Find:
    """The one resource of an address, `google_pubsub_topic.jobs` or `….function["sweep"]`."""

    def found(address: str) -> Resource:
        name, _, key = address.partition("[")
        (match,) = (each for each in plan if each.address == name and (not key or each.key == key.strip('"]')))
        return match

    return found
