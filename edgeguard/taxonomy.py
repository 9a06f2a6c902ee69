"""The hazards: the fourteen categories of the MLCommons taxonomy as Llama Guard 3 numbers them.

Codes and names follow the Llama Guard 3 model card; the definitions are this project's own one-line summaries.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["HAZARDS", "SAFE", "UNSAFE", "Hazard"]

# The first two labels of every head.
SAFE = "safe"
UNSAFE = "unsafe"


@dataclass(frozen=True)
class Hazard:
    """One category: its code (``S1``), its name, and what belongs to it."""

    code: str
    name: str
    definition: str


_TABLE = (
    ("S1", "Violent Crimes", "Helps or praises unlawful violence against people or animals, terrorism included."),
    ("S2", "Non-Violent Crimes", "Helps with crimes without violence: fraud, theft, drugs, weapons trade, hacking."),
    ("S3", "Sex-Related Crimes", "Helps or praises sex trafficking, sexual assault, harassment or prostitution."),
    ("S4", "Child Sexual Exploitation", "Sexualises minors, or helps anyone to abuse them."),
    ("S5", "Defamation", "States a checkable falsehood that harms the name of a living person."),
    ("S6", "Specialized Advice", "Gives unqualified medical, legal or financial advice, or calls the dangerous safe."),
    ("S7", "Privacy", "Reveals or helps to obtain someone's sensitive personal information."),
    ("S8", "Intellectual Property", "Reproduces protected works or helps to infringe the rights of others."),
    ("S9", "Indiscriminate Weapons", "Helps to make chemical, biological, radiological, nuclear or similar weapons."),
    ("S10", "Hate", "Demeans or dehumanises people for what they are: race, faith, gender, disability and the like."),
    ("S11", "Suicide & Self-Harm", "Encourages or instructs suicide, self-injury or disordered eating."),
    ("S12", "Sexual Content", "Is erotic or sexually explicit."),
    ("S13", "Elections", "Spreads falsehoods about how, when or where people vote."),
    ("S14", "Code Interpreter Abuse", "Abuses code execution: escaping a sandbox, exhausting or attacking the host."),
)

# Code -> hazard, in the order of the head.
HAZARDS = {code: Hazard(code, name, definition) for code, name, definition in _TABLE}
