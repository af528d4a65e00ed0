"""mkdocs hook: short code in sentences gets the class ``short``, which ``assets/site.css`` keeps in one line.

Browsers break ``-device cpu`` after its hyphen, and CSS cannot tell short code from commands longer than a line.
"""

import re

SHORT = 40  # characters
CODE = re.compile(rf"(?<!<pre>)(?<!</span>)<code>(?=[^<]{{1,{SHORT}}}</code>)")


def on_page_content(html: str, **_: object) -> str:
    """Mark short code."""
    return CODE.sub('<code class="short">', html)
