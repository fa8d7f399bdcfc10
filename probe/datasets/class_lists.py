"""Names of the classes of the public data sets, in the order of their ids."""

NYU13_CLASSES: tuple[str, ...] = tuple(
    ("bed|books|ceiling|chair|floor|furniture|objects|painting|sofa|table|tv|wall|window").split("|")
)
"""The 13 classes of Couprie et al.; 0 in the label files means none."""

NYU40_CLASSES: tuple[str, ...] = tuple(
    (
        "wall|floor|cabinet|bed|chair|sofa|table|door|window|bookshelf|picture|counter|blinds|desk|"
        "shelves|curtain|dresser|pillow|mirror|floor mat|clothes|ceiling|books|refrigerator|television|"
        "paper|towel|shower curtain|box|whiteboard|person|nightstand|toilet|sink|lamp|bathtub|bag|"
        "otherstructure|otherfurniture|otherprop"
    ).split("|")
)
"""The 40 classes of NYU and ScanNet; 0 in the label files means none."""

SCANNETPP_CLASSES: tuple[str, ...] = tuple(
    (
        "wall|ceiling|floor|table|door|ceiling lamp|cabinet|blinds|curtain|chair|storage cabinet|"
        "office chair|bookshelf|whiteboard|window|box|window frame|monitor|shelf|doorframe|pipe|heater|"
        "kitchen cabinet|sofa|windowsill|bed|shower wall|trash can|book|plant|blanket|tv|computer tower|"
        "kitchen counter|refrigerator|jacket|electrical duct|sink|bag|picture|pillow|towel|suitcase|"
        "backpack|crate|keyboard|rack|toilet|paper|printer|poster|painting|microwave|board|shoes|socket|"
        "bottle|bucket|cushion|basket|shoe rack|telephone|file folder|cloth|blind rail|laptop|plant pot|"
        "exhaust fan|cup|coat hanger|light switch|speaker|table lamp|air vent|clothes hanger|kettle|"
        "smoke detector|container|power strip|slippers|paper bag|mouse|cutting board|toilet paper|"
        "paper towel|pot|clock|pan|tap|jar|soap dispenser|binder|bowl|tissue box|whiteboard eraser|"
        "toilet brush|spray bottle|headphones|stapler|marker"
    ).split("|")
)
"""The 100 benchmark classes of ScanNet++."""

ADE20K_CLASSES: tuple[str, ...] = tuple(
    (
        "wall|building|sky|floor|tree|ceiling|road|bed|windowpane|grass|cabinet|sidewalk|person|earth|"
        "door|table|mountain|plant|curtain|chair|car|water|painting|sofa|shelf|house|sea|mirror|rug|"
        "field|armchair|seat|fence|desk|rock|wardrobe|lamp|bathtub|railing|cushion|base|box|column|"
        "signboard|chest of drawers|counter|sand|sink|skyscraper|fireplace|refrigerator|grandstand|path|"
        "stairs|runway|case|pool table|pillow|screen door|stairway|river|bridge|bookcase|blind|"
        "coffee table|toilet|flower|book|hill|bench|countertop|stove|palm|kitchen island|computer|"
        "swivel chair|boat|bar|arcade machine|hovel|bus|towel|light|truck|tower|chandelier|awning|"
        "streetlight|booth|television receiver|airplane|dirt track|apparel|pole|land|bannister|escalator|"
        "ottoman|bottle|buffet|poster|stage|van|ship|fountain|conveyer belt|canopy|washer|plaything|"
        "swimming pool|stool|barrel|basket|waterfall|tent|bag|minibike|cradle|oven|ball|food|step|tank|"
        "trade name|microwave|pot|animal|bicycle|lake|dishwasher|screen|blanket|sculpture|hood|sconce|"
        "vase|traffic light|tray|ashcan|fan|pier|crt screen|plate|monitor|bulletin board|shower|radiator|"
        "glass|clock|flag"
    ).split("|")
)
"""The 150 classes of the scene parsing benchmark; 0 in the label files means none."""

VOC_CLASSES: tuple[str, ...] = tuple(
    (
        "background|aeroplane|bicycle|bird|boat|bottle|bus|car|cat|chair|cow|dining table|dog|horse|"
        "motorbike|person|potted plant|sheep|sofa|train|tv monitor"
    ).split("|")
)
"""The 20 object classes of Pascal VOC 2012, and the background, which counts."""

SCANNET20_IDS: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16, 24, 28, 33, 34, 36, 39)
"""Values, in NYU40, of the 20 classes of ScanNet's own benchmark."""
