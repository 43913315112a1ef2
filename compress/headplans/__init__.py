"""Head plans of a model: texts, influence on them, candidate plans, and the choice by validation."""
