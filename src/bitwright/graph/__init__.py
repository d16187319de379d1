"""What a model does when it runs, what that means, and the naming of functional adds."""
