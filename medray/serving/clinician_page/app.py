"""The clinician page on Ray Serve: clinicians see an image, a question and two answers, and say which are
good.

    python -m serve.tokens clinicians.txt dr-lin
    serve run serve.annotate:build items=DIR database=sqlite:///judgements.db tokens=clinicians.txt

docs/clinician_page.md says what is stored and how to put it on a network.
"""

# Ray Serve reads the annotation of `build` as a class: no `from __future__ import annotations` here.
import logging
from ipaddress import ip_network
from typing import Annotated, Any

from pydantic import Field, field_validator
from ray import serve
from ray.serve import Application

from medray.config.section import PositiveInt, Section
from medray.plan.demand import Demand
from medray.serving.placement import check_fits, check_port, plain_errors

log = logging.getLogger("ray.serve")  # which `serve run` prints


class PageConfig(Section):
    items: str | None = Field(
        None,
        description="folder of clinician items (medray.records.CLINICIAN_ITEM), local or s3://, gs://; none: "
        "those in the database",
    )
    database: str = Field(
        "sqlite:///judgements.db", description="SQLAlchemy URL. SQLite serves one machine; PostgreSQL several"
    )
    tokens: str | None = Field(
        None,
        description="file made by python -m serve.tokens; none: the environment variable MEDRAY_CLINICIANS",
    )
    judgements_per_item: PositiveInt | None = Field(
        None,
        description="clinicians who are given each item; 2 or more measures their agreement. None: as many "
        "as the job that made the items waits for "
        "(by the database, or the config.yaml of the items' run), else 1",
    )
    hold_hours: Annotated[float, Field(gt=0)] = Field(
        24.0, description="hours after which an item that was opened and not judged may go to someone else"
    )
    seed: int = Field(0, description="of the order of items and, for each clinician, of answers")
    priority: int = Field(
        0, description="of these items; greater ones are shown before all others in the database"
    )
    title: str = Field("Which answers are good?", description="shown on the page")
    guidance: str = Field(
        "Good: medically correct, supported by this image, and useful as an answer to this question. Both "
        "answers may be good, or neither.",
        description="what `good` means, shown on the page",
    )
    session_hours: Annotated[float, Field(gt=0)] = Field(
        12.0, description="hours after which a clinician must sign in again"
    )
    proxies: list[str] = Field(
        ["127.0.0.1", "::1"],
        description="addresses (or networks, 10.0.0.0/8) of reverse proxies before the page; of requests "
        "that come from them X-Forwarded-For names the client, by which failed sign-ins are counted",
    )
    replicas: PositiveInt = Field(
        1, description="processes that answer; more than one needs a database that they all reach"
    )
    num_cpus: Annotated[float, Field(ge=0)] = Field(0.5, description="logical CPUs of each")

    @field_validator("proxies", mode="before")
    @classmethod
    def _parse_cli_values(cls, given: Any) -> Any:
        """`serve run` hands on words: proxies=10.0.0.1,10.0.0.2 is a list all the same."""
        return (
            [address.strip(" []\"'") for address in given.split(",") if address.strip(" []\"'")]
            if isinstance(given, str)
            else given
        )

    @field_validator("proxies")
    @classmethod
    def _addresses(cls, proxies: list[str]) -> list[str]:
        for proxy in proxies:
            try:
                ip_network(proxy)
            except ValueError:
                raise ValueError(
                    f"{proxy!r} is neither an address nor a network; write 10.0.0.1 or 10.0.0.0/8, without a "
                    "port"
                ) from None
        return proxies


@serve.deployment(name="clinician-page", max_ongoing_requests=64)
@serve.ingress()
class ClinicianPage:
    """A replica. It keeps nothing: whatever was said is in the database when the clinician is told so.

    Args:
        config: PageConfig as a dict.
        holders: hash of the token -> (name, lead).
    """

    def __init__(self, config: dict[str, Any], holders: dict[str, tuple[str, bool]]):
        from medray.clinicians.store import Store
        from medray.serving.tokens import Holder, Tokens

        self.config = PageConfig.model_validate(config)
        self.tokens = Tokens({digest: Holder(*holder) for digest, holder in holders.items()})
        self.store = Store(
            self.config.database,
            self.config.judgements_per_item or 1,
            self.config.hold_hours,
            self.config.seed,
        )

    def __serve_build_asgi_app__(self) -> Any:
        from medray.serving.clinician_page.asgi_app import make_app

        config = self.config
        return make_app(
            self.store,
            self.tokens,
            config.database,
            config.title,
            config.guidance,
            config.session_hours,
            config.proxies,
        )


def build(config: PageConfig) -> Application:
    """The application for `serve run` and Serve's config files; items are in the database when it returns.

    Raises ConfigError and DataError, before anything is served; `serve run` ends with their words.
    """
    with plain_errors():
        return _application(config)


def _application(config: PageConfig) -> Application:
    from medray.clinicians.database import absolute_url
    from medray.clinicians.import_export import import_items, progress_of
    from medray.serving.tokens import read_tokens

    tokens = read_tokens(config.tokens)
    check_port()
    check_fits(
        [Demand("num_cpus", config.replicas, config.replicas, config.num_cpus)],
        "lower num_cpus (of each replica) or replicas, or serve on a larger cluster",
    )
    config.database = absolute_url(config.database)  # replicas work in other folders
    if config.items is not None:
        log.info("items: %s", import_items(config.items, config.database, config.seed, config.priority))
    if not progress_of(config.database)["items"]:
        from medray.errors import DataError

        raise DataError(
            f"items: {config.items or config.database} has none that can be shown; look at the database's "
            "table clinician_item_set_aside"
        )
    config.judgements_per_item = _judgements_per_item(config)
    log.info("judgements_per_item: %d", config.judgements_per_item)
    holders = {digest: (holder.name, holder.lead) for digest, holder in tokens.holders.items()}
    page = ClinicianPage.options(
        num_replicas=config.replicas, ray_actor_options={"num_cpus": config.num_cpus}
    )
    return page.bind(config.model_dump(), holders)


def _judgements_per_item(config: PageConfig) -> int:
    """What the page is told, or what the job waits for. Raises ConfigError where the page would give
    items to too few clinicians.
    """
    from medray.clinicians.import_export import asked_for
    from medray.errors import ConfigError

    wanted = asked_for(config.database, config.items)
    if config.judgements_per_item is None:
        return wanted or 1
    if wanted is not None and config.judgements_per_item < wanted:
        raise ConfigError(
            f"judgements_per_item: the page would give each item to {config.judgements_per_item} "
            f"clinician(s), and the job that made the items waits for {wanted} "
            f"(clinicians.judgements_per_item); leave it out, or set {wanted}"
        )
    return config.judgements_per_item
