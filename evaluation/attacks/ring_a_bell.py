"""Ring-A-Bell: a genetic search for tokens whose states are the prompt's plus the direction of the concept.

Source: arXiv 2310.10012; github.com/chiayi-hsu/Ring-A-Bell. No denoiser is needed for the search. The concept's
direction is the mean difference of the token states of 30 to 50 pairs of prompts with and without it. The goal is the
states of a forbidden prompt plus η times the direction, the fitness of K tokens the squared distance of their states.
Population 200, 3,000 generations: the better half stays, each of it is crossed with probability 0.5 with another one
at a random place (two children), and with probability 0.25 one token of an individual becomes a random one. K = 16,
η = 3 for nudity, K = 77 (75 without begin and end), η = 5.5 for violence.

Deviations: the pairs are the task's own prompts of the concept and the same without the concept's word, since a suite
has no counterparts written by hand; a prompt that does not name its concept gets the word in front for its pair. Their
number is that of the prompts. K is at most what the tokenizer reads. The quick preset searches for four prompts.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from safemax_sd.evaluation.attacks.base import Access, Attack, Try
from safemax_sd.evaluation.attacks.target import Sampling, Target
from safemax_sd.evaluation.attacks.task import Task
from safemax_sd.evaluation.attacks.text import TextEncoders, pictures_of, refusal, reworded, searched
from torch import Tensor

from safemax_sd.families import TOKEN_STATES


@dataclass(frozen=True)
class RingABellSettings:
    """Settings of Ring-A-Bell.

    Attributes:
        searches: Numbers of tokens K, each with a strength η of the concept's direction; each pair is a try.
        population: Individuals of a generation, half of which stay.
        generations: Generations.
        crossover_rate: Probability that one that stays is crossed with another.
        mutation_rate: Probability that a token of an individual is replaced.
        prompts: Prompts of each concept that are searched for; the others take these texts. None for all, as published.
    """

    searches: tuple[tuple[int, float], ...] = ((16, 3.0), (77, 5.5))
    population: int = 200
    generations: int = 3000
    crossover_rate: float = 0.5
    mutation_rate: float = 0.25
    prompts: int | None = None


class RingABell(Attack):
    """Tokens whose states are near the prompt's, moved towards the concept."""

    name: ClassVar[str] = "ring_a_bell"
    version: ClassVar[int] = 2
    label: ClassVar[str] = "Ring-A-Bell"
    access: ClassVar[Access] = "prompt"
    paper: ClassVar[str] = "arXiv 2310.10012"
    note: ClassVar[str] = "a genetic search with the text encoder alone"
    Settings: ClassVar[type[Any]] = RingABellSettings
    presets: ClassVar[Mapping[str, Any]] = {
        "quick": RingABellSettings(((16, 3.0),), population=80, generations=150, prompts=4),
        "full": RingABellSettings(),
    }
    settings: RingABellSettings

    @classmethod
    def refusal(cls, target: Target) -> str | None:
        return refusal(target)

    def calls(self, task: Task, sampling: Sampling) -> int:
        return len(self.settings.searches) * sampling.calls(len(task))

    def run(self, target: Target, task: Task) -> Generator[Try]:
        encoders, settings = TextEncoders(target.family), self.settings
        directions = {concept: self.direction(encoders, task, concept) for concept in task.concepts}
        for tokens, strength in settings.searches:
            goals = [
                states(encoders, [prompt.text])[0] + strength * directions[prompt.shows] for prompt in task.prompts
            ]
            length = min(tokens, encoders.room)
            search = partial(self.text, encoders, task, goals, length)
            name = f"{self.name} {settings}, {length} tokens, strength {strength}"
            texts = searched(encoders, task, settings.prompts, search, name=name)
            pictures = pictures_of(target, texts, task.noise)
            yield Try(f"{length} tokens, strength {strength:g}", pictures, tuple(texts))

    @staticmethod
    def direction(encoders: TextEncoders, task: Task, concept: str) -> Tensor:
        """Return the mean difference of token states with and without a concept's word, [L, D]."""
        prompts = [prompt for prompt in task.prompts if prompt.shows == concept]
        present, absent = (states(encoders, [reworded(each, word) for each in prompts]) for word in (concept, ""))
        return (present - absent).mean(0)

    def text(self, encoders: TextEncoders, task: Task, goals: list[Tensor], tokens: int, row: int) -> str:
        """Search the text for a prompt's goal."""
        generator = task.generator(f"{self.name} {tokens} {row}")
        return encoders.texts([self.search(encoders, goals[row], tokens, generator)])[0]

    def search(self, encoders: TextEncoders, goal: Tensor, tokens: int, generator: torch.Generator) -> list[int]:
        """Return the tokens of the fittest individual of the last generation.

        Args:
            encoders: The target's text encoders.
            goal: Token states to come near to, [L, D].
            tokens: Number of tokens.
            generator: Generator of all draws.
        """
        settings = self.settings
        words = encoders.words.cpu()
        people = words[torch.randint(len(words), (settings.population, tokens), generator=generator)]
        for generation in range(settings.generations):
            people = people[distances(encoders, people, goal).argsort(stable=True)[: settings.population // 2]]
            if generation < settings.generations - 1:
                people = mutated(crossed(people, settings.crossover_rate, generator), words, settings, generator)
        return [int(token) for token in people[0]]


@torch.no_grad()
def states(encoders: TextEncoders, texts: list[str]) -> Tensor:
    """Return the token states of texts, [N, L, D]."""
    ids, _ = encoders.layout(encoders.tokens(texts))
    return encoders.encode(ids).conditioning.tensors[TOKEN_STATES]


@torch.no_grad()
def distances(encoders: TextEncoders, people: Tensor, goal: Tensor) -> Tensor:
    """Return the squared distance of each row of tokens [N, K] from a goal [L, D] in its states, [N]."""
    ids, _ = encoders.layout(people.tolist())
    return (encoders.encode(ids).conditioning.tensors[TOKEN_STATES] - goal).square().sum((1, 2)).cpu()


def crossed(parents: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """Return rows of tokens [N, K] and, with a probability for each, its two children with a random other one."""
    count, tokens = parents.shape
    chosen = torch.rand(count, generator=generator) < rate
    mates = parents[torch.randint(count, (count,), generator=generator)]
    cuts = torch.randint(tokens, (count, 1), generator=generator)
    first = torch.arange(tokens) < cuts
    children = (torch.where(first, parents, mates)[chosen], torch.where(first, mates, parents)[chosen])
    return torch.cat([parents, *children])


def mutated(people: Tensor, words: Tensor, settings: RingABellSettings, generator: torch.Generator) -> Tensor:
    """Return rows of tokens [N, K], one token of which is replaced by a random word with a probability for each row."""
    count, tokens = people.shape
    chosen = torch.rand(count, generator=generator) < settings.mutation_rate
    places = torch.randint(tokens, (count,), generator=generator)
    values = words[torch.randint(len(words), (count,), generator=generator)]
    changed = people.clone()
    changed[chosen, places[chosen]] = values[chosen]
    return changed
