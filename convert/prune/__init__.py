"""Models with fewer decoder layers, narrower MLPs or fewer heads."""
