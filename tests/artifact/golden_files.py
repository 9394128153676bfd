"""One small file per coder, in base 85, as pgolf wrote them; range at 460a0f9, before there were others."""

GOLDEN = {
    "range": (
        "P)AHg1ONa4IRXFxq6q*1AE5~#90_(Ti~EP<fEc7Y3Gu_$6emr(A^a+Mf~RS@mhu_@q|UjN_PBu0#iH}aev{~-kf@Zd9>bH*!"
        "(}3#6qQ6KuhfOOTg|I=D&RS*Q=j5+>1DSKeEH+?NgnhGRtg0wU`Xtl(1V9o*Jn!{gSpy={!DyFhDx2W&mbp}{th`sA8!^p`v"
        "Z9WBI|s}S0yH)+x%gPfEP@a^k;%T2$2tp%!qyZs+!C(M@cI2AyRd^36Rpn=^AaVOfe%-nlY}9`y&_%soV}{*oH~+^IA{nw^x"
        "YTU&6C&I^YA{lZ2hXKzmIQb!ZjJt^}7cWN5IDtWH=L^MQCHj;el-wK=3;Mt?%l|HSPhg>}`B9-_@?3sChW&G(1M%~`8w-_PG"
        "zCo`byD56wU4@HwuBkIlHi_R61yC%gS5zXsc#OqeJ7ofwi^@CO&VZ@hs3m374d>P2~eSk~Mz-zpu6*<q1RQv06%^Ydrma6k}"
        "?!Srh82-%dBh0nA#Q-hP(v{E$(B!5eF}n8tnk}>m_D|o9v0KHlfL946^xA102q`5y3&k3f+G3_O^y|3<3tkk%%Lf%sRz0a9r"
        "ahs5Oa|Pga<o?|+z%#PSjuCxSjg;f+EoA0K@_XVF^<%Zls*==DZlh<awlW0jfM=Y;A`RTy)^C3f+7i=RFbyjTwW=LzK?hrQ|"
        "v|Im5rQRC_@juSadtV014Y=J|xh+=r;E#Z5w^~7%XJ?;F|?~a5G#~-0tG}004oBpTqSvgy2fUN#21m@BrcI|Kt`I=LGNo>h1"
        "9I9}NiM`2gYR|Kt`I0Otho>hcI59RT>J0CWP303dunKR-V|Kgy4kOmY~^o38SjP(_@*w|z8oo1gGYKN0r^IL*2(8v"
    ),
    "brotli": (
        "P)AHg1ONa4I066wqX_^2AEF5W90_(Ti~EP<fEd(tDu4R302JCPy;RKTW~NO={KUIZ7`snmSM`tGv5H0Kk9+lFriDV$h|i7iM"
        "%J1gG}hp7O?wrpK~<v>o~8G04udlne;auD=kZ~Nx(hP|2c<Bl^r_Gr!xoJ_Lxcxgk#|z8d`pHP3jc?Y6HR}IL|wz1UE}=%()"
        "wcBIm`pSRHax7mrU@?gs^`o=$eTZNHZnY;5AmJj*}E77k7}s)MdadN}y)wF53tjqNN(`sbC61-ihbx#O#R80>7`d&t$J0**}"
        "BPYzpv+?qT9iXrRDG2s_L^qlRW_7&DaE9s61_&vQ-Frb1o^?_o*d4zv0Nr~ixg(av#OFV$q-wpD=F!<642A}5a=)pPA{+eNP"
        "cvm=cnHlVLR7468@%Zvt0&7<^z?<KEEky!#YZ9uRrNLpvN7r@ove65s6i1h@QP#RU_>p^Dc21+spJ+hzKHAXWl{1soh70SG("
        "qBz;wue}Tpdq(XD0WMp~*n**7cU~N6Qru7}Wxl`1@?3B~@ogFPp~A~}9U+h!kD^hCOIdqBJ>H_PB6Lqd|1}3og01qU?^>Ss?"
        "R@(@^Cm+P9=0)Ch2to>nd|NI%&H>Qcw;QY<^KFMxBJ)EUKJM?DU4bkFVkwi9=>S(hUMakta6;wSDmUx`l=<bmnffODXmy|b#"
        "pRuHoE@YicPl^<Ot-aiGDq(d$H`4KIHkd#WjOK39*Uu4TB3N=lWqW8|m`{4+nsO!-T_uiS^(~F`qR`-tYqt1c2e>=jj#%{}="
        "EB4+Mbf?eOv+4G7`+1CIiL;pFKS{}%&~0)Xf01oH3*10Nj#_@@AL0*nA4d_O-wKR-X)@of#_CH+ZgrC=_U0f$U8V?}e#l*OK"
        "CDxs=S4P?^"
    ),
    "lzma": (
        "P)AHg1ONa4KLP*%s|f%AAF2re90_(Ti~EP<fEc7Y3Gu_x%TAiKLwFi^f~T1_74Z}ALSgJO?5h5;lkQ^Cng3(9N^F`=d{%AxV"
        ";OZ3WyNQD?}X0aRHs9nbE$F~xOn)*-xqxO=kYFvI)Rk|f`XVM`XuOqVKe&F3jD#A;c^UxZ^<Aq()J<bC{2Hd1YP`_O~ZZzae"
        "0w;9Og#LMJX1;MJDi)5nTRI&=CdIGtI=<^;cg=9VW>|6qk_>>J(t+A)~rzhpn3pN=qr~*Nzwjw;{~s2+0vPv;V%<8l$~(2>&"
        "of^HqRPba#>Oh#OE~-DG<fWt7(>4dxk?*s*OXSeJ7|<Elce1Me=Oa7^kiK>ELEA8qW9<<>)%b(;aO?xOtu5V<&O_3U%~*G=>"
        "efE}ihTLbj<hoTJ$pSS=+Q_rpA{gRfb$jF`=SHN2mBrc=b3&8X$-W~M>Lfys_sEiEq<sjYb02S$l7MW!<4Z+Of|A;SDGbLVD"
        "MjmX{H%9tHotb?C@l9Dyyak3f&3ST8Bee}Gv5fckSQ-=G4}4cfuB#v!UPBO&68E4_5Js`?Sizk^TLkEuX8qfoM1rd7!OogD="
        "ejH3J!kLnQvRm?V1cSKpE@~#yX4IdIx}V`(v27Tf`D$z4*}l3K6Y2QI7wkqH9Y6TQjM>PPg*}=skkdun(J7rLse5>C8zZi<-"
        "JU$;upHgvBz#VI``a&7P`4WwdKbo{J9XIxDV?^I~j*9&Yul;l9b@v2PdWH{23#+LeB^NH+ooF000E$*0e?f03iVu0001VFXf"
        "{F01kn}gu{V}_25Y{pEXL}@BjeZY6$B7*W~m70VfaN8vJS>w)1@f000001X)`BH+ooF000E$*0e?f03iVu0001VFXf{F00`m"
        "a=jj#%{}=E80001SDeU$sfjyxB0U-%&7{%2ew)1@f000001X)`BH+ooF000E$*0e?f03iVu0001VFXf{F00`>s@bVuG2;unv"
        "0000kur(gt<cWm<0U-%&7{%2ew)1@f000001X)`BH+ooF000E$*0e?f03iVu0001VFXf{F00rUX=@$PN0001IdsF28n=ujq0"
        "UidyFQgqGw)1@f000001X)`BH+ooF000E$*0e?f03iVu0001VFXf{F00rmj1oH3*0000gaO{E*nl5Yr0UidyFQgqGw)1@f00"
        "0001X)@i9RT>J0CWP303dunKR-V|Kb3_V*ctQN1?pAH&MrbtN&SDsHU%B}Uu?X32E~tXj{"
    ),
    "zlib": (
        "P)AHg1ONa4I|2Xzr3nB4AEXHY90_(Ti~EP<fEd(tDu0?RJQUh0y;RKTW~NO={KUIZ7`qI+s(<XHyI6GQ|Cp^3o2C<=RUrIWW"
        "m5J<S@D_PJE1c;)#(uDT&kP~E*`k}`+}E$9&cx;LzrP8$cH(iPl9R~HlvRW!yjxJD#TFumJ9+T%pXFI()4#o(8a&mH0(DJml"
        "tWrVNSGMlwvVlWCAZ4!LAPl?Q^4grkNP4^6Cqz!z9^>;sVk^9S6*uWK;_!vvsgRX(>g2${K^<HiWq}AvwZkmfzP}X0%rh;UB"
        "<gz6$V(?soDWaRUmhgKSTs8)Y;}gLwuec3@iy=H=|uxT+BAz`I>29B{ASK>ELEA8qW9<yK9Wb(;jRZm0bI5V<IFRL`})brZb"
        "<V25es@B#YzL(ztOf~~;N)N||jUeXd38QD|g3V2I`#AP&l0hk8P`^xedLfyb+sEj1?<shwV0~P6l78z$W4Z+MJe~T|(GbLVD"
        "Ml81KYa{)k&PW|YeB+iAZ-Jp%b8gOQq_#mNmht``OJm~u!gpn)y9$!wH3R`EaVPo&VHE3*IEFad7Xdm`tbd!6lc1`65ToX4p"
        "4<8DDKlp1P5r?ERfT3P?l{-^?I|;622zX%eL*NU=gVj}ua8v~E;cDNS99ZGdX2AzH?5zrRNRqQntPe5rK+Z{lGD0Hc^^}$_("
        "oSY=ExU}_MN{&?lrohKs6U@QhhH3D6VCVXdz?SV*hNolb{6OGT4-!{WC^x`p*w|+G{-Aa=5Yc>jO{2`KDg?J^%nmKnT%z+I#"
        "rq`AadD|KcA2A94k@c-njQ_QNN6UXF)90UwD4$ava&_~fP7e{ld0y93*J+I#+r<<kca01nUtz#km|_@@AL0*nA4d_O-wKR-V"
        "Z1Bws`WMA$%%{~>seAg1_|C{VpjsbF&`0c=~9e9Q"
    ),
}
