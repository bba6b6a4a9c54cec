"""How the system is brought up: on Google Cloud, and against real servers on one machine (`infra.local`)."""
